"""What stores do for their pages, over random histories of deaths, joins, drains and lost messages."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from longreach.core.page_key import PageKey
from longreach.kvstore.membership import Member, Membership
from longreach.kvstore.placement import place, rank
from longreach.kvstore.repair_plan import Answer, OwnPage, Todo, plan, questions

from .kv_helpers import ROOT, key_of

REPLICAS = 2
KEYS = [key_of(i) for i in range(6)]
MAX_STORES = 5


class Cluster:
    """Stores as sets of keys; each knows a membership of its own."""

    def __init__(self, n_stores: int, replicas: int = REPLICAS) -> None:
        self.replicas = replicas
        self.held: dict[str, dict[PageKey, int]] = {}  # store -> key -> pins
        self.known: dict[str, Membership] = {}
        self.now = Membership(0)
        for i in range(n_stores):
            self.join(f"s{i}")
        self.tell_all()

    def join(self, name: str, zone: str = "", weight: float = 1.0) -> None:
        node = f"node-{name}"
        self.now = self.now.next([*self.now, Member(name, f"mem://{name}", node, zone, weight)])
        self.held[name], self.known[name] = {}, Membership(0)

    def die(self, name: str) -> None:
        del self.held[name], self.known[name]
        self.now = self.now.next(m for m in self.now if m.store_id != name)

    def tell_all(self) -> None:
        self.known = dict.fromkeys(self.held, self.now)

    def holders(self, key: PageKey) -> set[str]:
        return {name for name, held in self.held.items() if key in held}

    def survey(self, me: str, silent: frozenset[str] = frozenset()) -> list[Todo]:
        """As the repairer does it: ask, plan, ask everyone about what is to be pushed, plan."""
        membership = self.known[me]
        pages = [OwnPage(key, ROOT, pins > 0) for key, pins in sorted(self.held[me].items())]
        ranks = {page.key: rank(page.key, membership) for page in pages}
        asked = questions(me, self.replicas, ranks)
        answers = {
            name: Answer(self.known[name].epoch, frozenset(k for k in keys if k in self.held[name]))
            for name, keys in asked.items()
            if name in self.held and name not in silent
        }
        todos = plan(me, self.replicas, membership.epoch, ranks, pages, answers)
        unsure = [todo.page.key for todo in todos if todo.pushes]
        for name in membership.addresses() if unsure else ():
            if name != me and name in self.held and name not in silent:
                held = frozenset(key for key in unsure if key in self.held[name])
                first = answers.get(name, Answer(self.known[name].epoch, frozenset()))
                answers[name] = Answer(first.epoch, first.held | held)
        return plan(me, self.replicas, membership.epoch, ranks, pages, answers)

    def drop(self, name: str, key: PageKey, epoch: int) -> bool:
        """The store's own `drop`: not under another epoch, not what is pinned."""
        held = self.held.get(name, {})
        if key not in held or held[key] or self.known[name].epoch != epoch:
            return False
        del held[key]
        return True

    def round(self) -> tuple[Counter[tuple[PageKey, str]], int]:
        """Every store looks at all its pages and does all it should. Pushes by (key, target), and
        how many pages were dropped."""
        pushes: Counter[tuple[PageKey, str]] = Counter()
        todos = {name: self.survey(name) for name in self.held}
        for name in todos:
            for todo in todos[name]:
                for target in todo.pushes:
                    pushes[todo.page.key, target] += 1
                    self.held[target].setdefault(todo.page.key, 0)
        n_dropped = 0
        for name in self.held:
            drops = [todo.page.key for todo in self.survey(name) if todo.droppable]
            n_dropped += sum(self.drop(name, key, self.known[name].epoch) for key in drops)
        return pushes, n_dropped

    def settle(self) -> Counter[tuple[PageKey, str]]:
        """Rounds until nothing is to do."""
        self.tell_all()
        total: Counter[tuple[PageKey, str]] = Counter()
        for _ in range(4):
            pushes, n_dropped = self.round()
            assert not pushes or max(pushes.values()) == 1, "two stores gave the same copy"
            total += pushes
            if not pushes and not n_dropped:
                return total
        raise AssertionError("does not come to rest")

    def check_in_place(self) -> None:
        for key in {key for held in self.held.values() for key in held}:
            targets = set(place(key, self.now, self.replicas))
            assert len(targets) == min(self.replicas, len(self.held))
            kept = {name for name in self.holders(key) if self.held[name][key]}
            assert self.holders(key) == targets | kept


class RepairMachine(RuleBasedStateMachine):
    """Looks at pages and what follows from them are apart: anything may happen in between, but that
    a target dies or evicts between the look at it and the drop elsewhere (milliseconds)."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster(3)
        for key in KEYS:
            for name in place(key, self.cluster.now, REPLICAS):
                self.cluster.held[name][key] = 0
        self.n_names = 3
        self.pushes: list[tuple[str, PageKey, str]] = []
        self.drops: list[tuple[str, PageKey, int]] = []
        self.alive: set[PageKey] = set(KEYS)  # pages that must not be lost

    def _pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.cluster.held)))

    def _gone(self, keys: set[PageKey]) -> None:
        """Copies went by death or eviction: what nobody holds now is lost through no fault of
        repair."""
        self.drops = [drop for drop in self.drops if drop[1] not in keys]
        self.alive = {key for held in self.cluster.held.values() for key in held}

    @rule(key=st.sampled_from(KEYS), data=st.data())
    def store(self, key: PageKey, data: st.DataObject) -> None:
        """By a client that knows what some store knows."""
        known = self.cluster.known[self._pick(data)]
        for name in place(key, known, REPLICAS):
            if name in self.cluster.held:
                self.cluster.held[name].setdefault(key, 0)
                self.alive.add(key)

    @rule(key=st.sampled_from(KEYS), n_pins=st.integers(0, 1), data=st.data())
    def pin(self, key: PageKey, n_pins: int, data: st.DataObject) -> None:
        name = self._pick(data)
        if key in self.cluster.held[name]:
            self.cluster.held[name][key] = n_pins

    @rule(key=st.sampled_from(KEYS), data=st.data())
    def evict(self, key: PageKey, data: st.DataObject) -> None:
        name = self._pick(data)
        if self.cluster.held[name].get(key) == 0:
            del self.cluster.held[name][key]
            self._gone({key})

    @precondition(lambda self: len(self.cluster.held) > 2)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        name = self._pick(data)
        keys = set(self.cluster.held[name])
        self.cluster.die(name)
        self._gone(keys)

    @precondition(lambda self: len(self.cluster.held) < MAX_STORES)
    @rule(zone=st.sampled_from(["", "a", "b"]), weight=st.sampled_from([0.3, 1.0, 4.0]))
    def join(self, zone: str, weight: float) -> None:
        self.cluster.join(f"s{self.n_names}", zone, weight)
        self.n_names += 1

    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        if sum(not member.draining for member in self.cluster.now) > 1:
            self.cluster.now = self.cluster.now.drained(self._pick(data))

    @rule(data=st.data())
    def leave_or_come_back(self, data: st.DataObject) -> None:
        """The supervisor's mistake: a store that lives is no member for a while."""
        name = self._pick(data)
        left = [member for member in self.cluster.now if member.store_id != name]
        if len(left) == len(self.cluster.now):
            left.append(Member(name, f"mem://{name}", f"node-{name}"))
        if left:
            self.cluster.now = self.cluster.now.next(left)

    @rule(data=st.data(), everyone=st.booleans())
    def tell(self, data: st.DataObject, everyone: bool) -> None:
        for name in sorted(self.cluster.held) if everyone else [self._pick(data)]:
            self.cluster.known[name] = self.cluster.now

    @rule(data=st.data(), silent=st.frozensets(st.integers(0, MAX_STORES), max_size=2))
    def look(self, data: st.DataObject, silent: frozenset[int]) -> None:
        """What is decided is done later, or never."""
        me = self._pick(data)
        for todo in self.cluster.survey(me, frozenset(f"s{i}" for i in silent)):
            self.pushes += [(me, todo.page.key, target) for target in todo.pushes]
            if todo.droppable:
                self.drops.append((me, todo.page.key, self.cluster.known[me].epoch))

    @rule(data=st.data())
    def look_and_push(self, data: st.DataObject) -> None:
        me = self._pick(data)
        for todo in self.cluster.survey(me):
            for target in todo.pushes:
                self.cluster.held[target].setdefault(todo.page.key, 0)
        for todo in self.cluster.survey(me):
            if todo.droppable:
                self.drops.append((me, todo.page.key, self.cluster.known[me].epoch))

    @precondition(lambda self: self.pushes)
    @rule(data=st.data(), lost=st.booleans())
    def push(self, data: st.DataObject, lost: bool) -> None:
        me, key, target = self.pushes.pop(data.draw(st.integers(0, len(self.pushes) - 1)))
        alive = key in self.cluster.held.get(me, {}) and target in self.cluster.held
        if alive and not lost:
            self.cluster.held[target].setdefault(key, 0)

    @precondition(lambda self: self.drops)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.drops) - 1))
        self.cluster.drop(*self.drops.pop(at))

    @precondition(lambda self: len(self.drops) > 1)
    @rule()
    def drop_all(self) -> None:
        for drop in self.drops:
            self.cluster.drop(*drop)
        self.drops.clear()

    @invariant()
    def no_page_is_lost(self) -> None:
        for key in self.alive:
            assert self.cluster.holders(key), "repair dropped the last copy"

    def teardown(self) -> None:
        """The world stands still: everything comes to where it should be and stays there."""
        for name in self.cluster.held:  # the supervisor sees everyone again
            if self.cluster.now.find(name) is None:
                back = Member(name, f"mem://{name}", f"node-{name}")
                self.cluster.now = self.cluster.now.next([*self.cluster.now, back])
        self.cluster.settle()
        self.no_page_is_lost()
        self.cluster.check_in_place()
        for held in self.cluster.held.values():
            held.update(dict.fromkeys(held, 0))
        self.cluster.settle()
        self.cluster.check_in_place()
        self.no_page_is_lost()
        for name in self.cluster.held:
            assert self.cluster.survey(name) == []


RepairMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=50)
TestRepair = RepairMachine.TestCase


@pytest.mark.parametrize("replicas", [1, 2])
def test_stores_that_disagree_never_drop_the_last_copy(replicas: int) -> None:
    """Thousands of steps of what is dangerous: memberships change, and reach the stores one by one
    between a look at the pages and the drops that it allowed."""
    random = Random(replicas)
    actions = ["change", *["tell"] * 4, *["look"] * 3, *["drop"] * 2]
    n_dropped = 0
    for _ in range(100):
        cluster, n_names, drops = filled(3, 3, replicas), 3, []
        for _ in range(100):
            me = random.choice(sorted(cluster.held))
            match random.choice(actions):
                case "change" if random.random() < 0.5 and n_names < 5:
                    cluster.join(f"s{n_names}")
                    n_names += 1
                case "change":  # it seems lost, or is seen again
                    left = [member for member in cluster.now if member.store_id != me]
                    known = len(left) < len(cluster.now)
                    again = [] if known and left else [Member(me, f"mem://{me}", f"node-{me}")]
                    cluster.now = cluster.now.next([*left, *again])
                case "tell":
                    cluster.known[me] = cluster.now
                case "look":
                    for todo in cluster.survey(me):
                        for target in todo.pushes:
                            cluster.held[target].setdefault(todo.page.key, 0)
                    epoch = cluster.known[me].epoch
                    found = [todo.page.key for todo in cluster.survey(me) if todo.droppable]
                    drops += [(me, key, epoch) for key in found]
                case "drop" if drops:
                    n_dropped += cluster.drop(*drops.pop(random.randrange(len(drops))))
            assert all(cluster.holders(key_of(i)) for i in range(3))
    assert n_dropped > 100


def filled(n_stores: int, n_pages: int, replicas: int = REPLICAS) -> Cluster:
    cluster = Cluster(n_stores, replicas)
    for i in range(n_pages):
        for name in place(key_of(i), cluster.now, replicas):
            cluster.held[name][key_of(i)] = 0
    return cluster


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_join_moves_its_share_and_nothing_else(replicas: int) -> None:
    cluster = filled(5, 400, replicas)
    assert cluster.settle() == Counter()
    cluster.join("new")
    pushes = cluster.settle()
    assert {target for _, target in pushes} == {"new"}
    expected = 400 * replicas / 6
    assert 0.7 * expected < len(pushes) < 1.3 * expected
    cluster.check_in_place()


@pytest.mark.parametrize("replicas", [2, 3])
def test_a_death_costs_what_the_dead_store_held(replicas: int) -> None:
    cluster = filled(5, 400, replicas)
    lost = len(cluster.held["s2"])
    cluster.die("s2")
    assert sum(cluster.settle().values()) == lost
    cluster.check_in_place()


def test_a_drain_moves_everything_and_keeps_nothing() -> None:
    cluster = filled(4, 200)
    cluster.now = cluster.now.drained("s1")
    cluster.settle()
    cluster.check_in_place()
    assert cluster.held["s1"] == {}


def test_a_draining_store_that_is_needed_keeps_its_pages() -> None:
    cluster = filled(2, 50)
    cluster.now = cluster.now.drained("s1")
    assert cluster.settle() == Counter()
    assert len(cluster.held["s1"]) == 50


def test_the_first_holder_in_order_gives_the_copy_and_counts_it() -> None:
    key = KEYS[0]
    cluster = Cluster(5)
    order = rank(key, cluster.now)
    cluster.held[order[3]][key] = cluster.held[order[4]][key] = 0
    (first,), (second,) = cluster.survey(order[3]), cluster.survey(order[4])
    assert (first.pushes, first.surplus, first.n_short) == (tuple(order[:2]), True, 0)
    assert (second.pushes, second.surplus, second.droppable) == ((), True, False)
    del cluster.held[order[4]][key]
    (alone,) = cluster.survey(order[3])
    assert alone.n_short == 1


def test_a_store_that_is_silent_gets_nothing_and_allows_nothing() -> None:
    key = KEYS[0]
    cluster = Cluster(4)
    first, second, third, _ = rank(key, cluster.now)
    for name in (first, second, third):
        cluster.held[name][key] = 0
    (surplus,) = cluster.survey(third)
    assert surplus.droppable
    (unsure,) = cluster.survey(third, frozenset([second]))
    assert not unsure.droppable
    assert unsure.lacking == (second,)
    (alone,) = cluster.survey(first, frozenset([second]))
    assert (alone.pushes, alone.n_short) == ((), 1)


def test_an_answer_of_another_epoch_allows_no_drop() -> None:
    key = KEYS[0]
    cluster = Cluster(3)
    *targets, third = rank(key, cluster.now)
    for name in cluster.held:
        cluster.held[name][key] = 0
    cluster.known[targets[0]] = Membership(99, cluster.now.members)
    (todo,) = cluster.survey(third)
    assert not todo.droppable
    assert todo.lacking == ()


def test_a_pinned_page_is_not_dropped() -> None:
    key = KEYS[0]
    cluster = Cluster(3)
    for name in cluster.held:
        cluster.held[name][key] = 1
    (todo,) = cluster.survey(rank(key, cluster.now)[2])
    assert todo.surplus
    assert not todo.droppable


def test_a_store_that_is_no_member_gives_its_pages_away() -> None:
    cluster = filled(3, 20)
    cluster.now = cluster.now.next(m for m in cluster.now if m.store_id != "s0")
    cluster.settle()
    assert cluster.held["s0"] == {}
    assert all(cluster.holders(key_of(i)) == {"s1", "s2"} for i in range(20))
