"""Lists in requests: every row once, groups whole, and the prompt sent once where that is possible."""

from hypothesis import given
from hypothesis import strategies as st

from polar_ray.client.parts import fault_of, sendable_ids, split_ids, split_triples
from polar_ray.errors import RowUnreadable, TripleError
from polar_ray.triples import TokenIds, Triple
from polar_ray.wire import RewardsRequest

texts = st.sampled_from(["a", "b", "c"])
triples = st.builds(Triple, texts, texts, st.text(max_size=3), st.sampled_from(["sft", "pretrain"]))


@given(st.lists(triples, max_size=40), st.integers(1, 12))
def test_every_row_travels_once_and_as_itself(given_triples, rows_per_request):
    parts = list(split_triples(given_triples, rows_per_request))
    places = [place for part in parts for place in part.places]
    assert sorted(places) == list(range(len(given_triples)))
    for part in parts:
        assert 1 <= len(part.places) <= rows_per_request
        assert RewardsRequest.model_validate(part.body).rows() == [given_triples[place] for place in part.places]


@given(st.lists(triples, max_size=40), st.integers(1, 12))
def test_a_group_is_torn_only_if_it_is_larger_than_a_request(given_triples, rows_per_request):
    found: dict[tuple, set[int]] = {}
    sizes: dict[tuple, int] = {}
    for number, part in enumerate(split_triples(given_triples, rows_per_request)):
        for place in part.places:
            triple = given_triples[place]
            key = (triple.prompt, triple.reference, triple.wrapper)
            found.setdefault(key, set()).add(number)
            sizes[key] = sizes.get(key, 0) + 1
    for key, numbers in found.items():
        assert len(numbers) <= -(-sizes[key] // rows_per_request)


def test_a_group_sends_its_prompt_once():
    (part,) = split_triples([Triple("P", "R", str(n)) for n in range(3)], 8)
    assert part.body == {"prompt": "P", "reference": "R", "outputs": ["0", "1", "2"]}


def test_a_group_with_ids_keeps_them():
    (part,) = split_triples([Triple("P", "R", str(n), id=str(n)) for n in range(2)], 8)
    assert [row["id"] for row in part.body["triples"]] == ["0", "1"]


def test_conversations_of_one_content_are_one_group():
    message = [{"role": "user", "content": "P"}]
    (part,) = split_triples([Triple(message, "R", "a"), Triple([dict(message[0])], "R", "b")], 8)
    assert part.body == {"prompt": message, "reference": "R", "outputs": ["a", "b"]}


def test_ids_are_split_in_order():
    parts = list(split_ids([TokenIds([n]) for n in range(5)], 2))
    assert [part.body["ids"] for part in parts] == [[[0], [1]], [[2], [3]], [[4]]]


def test_what_cannot_be_sent_is_said_before():
    assert fault_of(Triple("P", "R", "O")) is None
    assert isinstance(fault_of(Triple("P", "R", "\ud800")), RowUnreadable)
    assert isinstance(fault_of(Triple("P", None, "O")), TripleError)
    assert isinstance(fault_of(Triple("P", "R", "O", wrapper="chat")), TripleError)
    assert isinstance(fault_of(Triple("P", "R", "O", id="\ud800")), RowUnreadable)
    assert isinstance(fault_of(Triple("P", "R", [{"role": "\ud800", "content": "O"}])), RowUnreadable)
    assert sendable_ids(TokenIds([1, 2])) == TokenIds([1, 2])
    assert isinstance(sendable_ids(TokenIds("12")), TripleError)
