"""OpenAI's own Python client against our endpoint: a grader's run, the list of models, embeddings, errors."""

import pytest

from polar_ray import Scorer, Triple
from polar_ray.config import EngineConfig, LimitsConfig

pytestmark = pytest.mark.clients

TRIPLE = Triple("What is the capital of China?", "Beijing.", "Shanghai.")
ITEM = {"prompt": TRIPLE.prompt, "reference": TRIPLE.reference}
RENDERED = f"{TRIPLE.prompt}\n{TRIPLE.reference}<|reward|>{TRIPLE.prompt}\n{TRIPLE.output}[UNUSED_TOKEN_130]"
GRADER = {"type": "score_model", "name": "polar", "model": "POLAR-7B", "input": []}


@pytest.fixture(scope="module")
def openai(clients):
    return pytest.importorskip("openai", reason="openai is not installed; run make clients")


@pytest.fixture(scope="module")
def client(openai, endpoint):
    with openai.OpenAI(base_url=f"http://{endpoint}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def reward():
    limits = LimitsConfig(cut_side="left")
    with Scorer.open(engine=EngineConfig(device="cpu", dtype="float32"), limits=limits) as scorer:
        return scorer.score([TRIPLE])[0].reward


def test_a_graders_run_is_the_scorers_reward(client, reward):
    run = client.fine_tuning.alpha.graders.run(grader=GRADER, model_sample=TRIPLE.output, item=ITEM)
    assert run.reward == pytest.approx(reward, abs=1e-5)
    assert (run.metadata.name, run.metadata.type) == ("polar", "score_model")
    assert not any(run.metadata.errors.model_dump().values())
    assert run.metadata.execution_time > 0


def test_every_field_of_the_contract_is_there_and_of_its_type(client):
    reply = client.fine_tuning.alpha.graders.with_raw_response.run(grader=GRADER, model_sample=TRIPLE.output, item=ITEM)
    kind = type(reply.parse())  # the client itself does not validate replies; its model can
    checked = kind.model_validate(reply.http_response.json(), strict=True)
    assert not checked.model_extra
    assert not checked.metadata.model_extra
    assert not checked.metadata.errors.model_extra


def test_a_missing_reference_is_an_error_of_the_client_with_our_sentence(openai, client):
    with pytest.raises(openai.BadRequestError, match="item has no reference, which POLAR needs") as caught:
        client.fine_tuning.alpha.graders.run(grader=GRADER, model_sample="O", item={"prompt": "P"})
    assert caught.value.code == "request_invalid"


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("embedded", "model", "polar_ray")


def test_an_embedding_is_the_reward_and_base64_is_refused(openai, client, reward):
    found = client.embeddings.create(model="POLAR-7B", input=RENDERED, encoding_format="float")
    assert found.data[0].embedding == pytest.approx([reward], abs=1e-5)
    with pytest.raises(openai.BadRequestError, match="send float"):
        client.embeddings.create(model="POLAR-7B", input=RENDERED)  # the client asks for base64 by itself
