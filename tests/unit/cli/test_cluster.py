"""`polar-ray cluster render`: where manifests go, and what is said of settings that could not work."""

import pytest
import yaml

from polar_ray.cli.main import main


@pytest.fixture
def render(capsys):
    """`polar-ray cluster render` with arguments; its exit code, what it prints and what it says."""

    def run(*arguments):
        with pytest.raises(SystemExit) as done:
            main(["cluster", "render", *map(str, arguments)])
        printed = capsys.readouterr()
        return done.value.code, printed.out, printed.err

    return run


@pytest.mark.parametrize("kind", ["serve", "score", "train"])
def test_manifests_are_printed_or_written(render, tmp_path, kind):
    code, out, _ = render(kind)
    assert code == 0
    assert [manifest["kind"] for manifest in yaml.safe_load_all(out)][1:] == ["NetworkPolicy"]
    file = tmp_path / "manifests.yaml"
    assert render(kind, "--output", file) == (0, "", "")
    assert file.read_text() == out


def test_settings_come_from_a_file_and_assignments_go_over_it(render, tmp_path):
    (tmp_path / "ours.toml").write_text('name = "ours"\nnamespace = "judges"\n[workers]\nspot = "0:3"\n')
    code, out, _ = render("score", "--config", tmp_path / "ours.toml", "--set", "workers.spot=0:5")
    job = next(yaml.safe_load_all(out))
    assert code == 0
    assert job["metadata"] == {"name": "ours", "namespace": "judges"}
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] == 5


def test_check_compares_and_writes_nothing(render, tmp_path):
    file = tmp_path / "manifests.yaml"
    code, _, err = render("serve", "--output", file, "--check")
    assert code == 2
    assert "is not what would be rendered now" in err
    assert not file.exists()
    render("serve", "--output", file)
    assert render("serve", "--output", file, "--check")[0] == 0
    code, _, err = render("serve", "--output", file, "--check", "--set", "haproxy=false")
    assert code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["notebook"], "kind = 'notebook': expected one of serve, score, train"),
        (["serve", "--check"], "name it with --output"),
        (["serve", "--set", "callers=nobody"], "callers = 'nobody'"),
        (["score", "--set", "serve.model=x"], "unknown setting 'serve'; known here: name, namespace"),
    ],
)
def test_what_could_not_work_is_a_sentence(render, arguments, said):
    code, out, err = render(*arguments)
    assert (code, out) == (2, "")
    assert said in err
