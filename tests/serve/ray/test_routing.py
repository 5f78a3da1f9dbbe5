"""The order of the replicas for each route."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afnext.serve.context_store import new_id
from afnext.serve.ray.routing import Refusal, candidates, new_route, preference, route_in, route_of

ROUTES = st.binary(min_size=4, max_size=4).map(bytes.hex)
REPLICAS = st.lists(st.integers(0, 999).map("replica{}".format), min_size=1, max_size=12, unique=True)
KEYS = st.sampled_from(["", "me", "you"])


@given(ROUTES, REPLICAS, st.randoms())
def test_the_order_holds_all_replicas_and_does_not_depend_on_theirs(route, replicas, random) -> None:
    order = preference(route, replicas)
    assert sorted(order) == sorted(replicas)
    assert preference(route, random.sample(replicas, len(replicas))) == order
    assert candidates(route, replicas) == order[:3]


@given(ROUTES, REPLICAS, st.data())
def test_a_replica_that_comes_or_goes_leaves_the_others_in_their_order(route, replicas, data) -> None:
    """So only what is at home on it moves, and it moves to the replica that took its overflow."""
    gone = data.draw(st.sampled_from(replicas))
    left = [replica for replica in replicas if replica != gone]
    assert preference(route, left) == [replica for replica in preference(route, replicas) if replica != gone]


def test_routes_are_spread_evenly(seed: int) -> None:
    replicas = [f"{seed}-{number}" for number in range(8)]
    orders = [preference(f"{seed * 4001 + number:08x}", replicas) for number in range(4000)]
    for place in (0, 1):  # homes, and where their overflow goes
        counts = [sum(order[place] == replica for order in orders) for replica in replicas]
        assert max(abs(count - 500) for count in counts) < 125  # six standard deviations
    after_first = {order[1] for order in orders if order[0] == replicas[0]}
    assert after_first == set(replicas[1:])


@given(ROUTES)
def test_ids_carry_the_route(route: str) -> None:
    assert route_in(new_id(route)) == route
    assert route_in(f"file-{'0' * 32}{route}") == route


@pytest.mark.parametrize(
    "identifier", ["", "ctx_1", "ctx_" + "0" * 32, "ctx_" + "g" * 40, "file-" + "0" * 41, "../" + "0" * 40]
)
def test_other_ids_carry_none(identifier: str) -> None:
    assert route_in(identifier) is None
    assert route_in(new_id()) is None


@given(st.binary(max_size=40), KEYS, KEYS)
def test_a_route_belongs_to_a_recording_and_a_key(digest: bytes, one: str, two: str) -> None:
    assert route_of(digest, one) == route_of(digest, one)
    assert len(route_of(digest, one)) == len(new_route()) == 8
    if one == two:
        assert route_of(digest, one) == route_of(digest, two)


def test_keys_have_routes_of_their_own() -> None:
    assert len({route_of(b"recording", f"key {number}") for number in range(100)}) == 100


def test_the_best_refusal_is_the_one_to_come_again_soonest() -> None:
    refusals = [Refusal(503, 1), Refusal(429, 60), Refusal(429, 7), Refusal(503, 5)]
    assert min(refusals) == Refusal(429, 7)
