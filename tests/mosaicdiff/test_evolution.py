import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mosaicdiff
from mosaicdiff.search import EvolutionSettings, evolution, evolve
from mosaicdiff.search import state as state_module

LIMITS, SEED = (6, 6, 3, 6, 5, 6), (2, 3, 3, 2, 3, 2)
SHORT = EvolutionSettings(population=9, offspring=6, survivors=3, generations=5, batch=4, seed=3)
WEIGHTS = (0.3, 2.0, 1.1, 0.7, 1.7, 0.05)


def error(genome) -> float:
    """Separable and convex, with no two genes alike."""
    return sum(w * level**1.5 for w, level in zip(WEIGHTS, genome, strict=False))


def errors(genomes) -> list[float]:
    return [error(genome) for genome in genomes]


def found(outcome) -> tuple:
    """All of an outcome but its time."""
    return (
        outcome.best, outcome.fitness, outcome.generations, outcome.evaluations, outcome.history,
        outcome.complete,
    )  # fmt: skip


def kept(genomes: list):
    """An evaluation that adds what it is asked for to a list."""

    def evaluate(batch):
        genomes.extend(batch)
        return errors(batch)

    return evaluate


@st.composite
def problems(draw):
    limits = draw(st.lists(st.integers(0, 9), max_size=8))
    seed = tuple(draw(st.integers(0, limit)) for limit in limits)
    settings = EvolutionSettings(
        population=draw(st.integers(1, 12)),
        offspring=draw(st.integers(1, 8)),
        survivors=draw(st.integers(1, 4)),
        generations=draw(st.integers(0, 4)),
        max_levels=draw(st.integers(1, 7)),
        switches=draw(st.integers(1, 4)),
        batch=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 99)),
    )
    return limits, seed, settings


@given(problems())
def test_sum_and_limits_hold_and_nothing_is_evaluated_twice(problem):
    limits, seed, settings = problem
    seen: list = []
    outcome = evolve(limits, [seed, seed], kept(seen), settings)
    assert all(sum(genome) == sum(seed) for genome in seen)
    assert all(0 <= x <= m for genome in seen for x, m in zip(genome, limits, strict=True))
    assert set(Counter(seen).values()) == {1}
    assert outcome.evaluations == len(seen)
    assert seen[0] == seed
    assert len(seen) <= settings.population + settings.offspring * settings.generations
    assert (outcome.best, outcome.fitness) == min(
        ((genome, error(genome)) for genome in seen), key=lambda pair: pair[1]
    )
    assert len(outcome.history) == settings.generations + 1 and outcome.complete
    assert list(outcome.history) == sorted(outcome.history, reverse=True)


def test_new_genomes_are_made_while_there_are_any():
    seen: list = []
    evolve(LIMITS, [SEED], kept(seen), SHORT)
    assert len(seen) == SHORT.population + SHORT.offspring * SHORT.generations


def test_the_numbers_drawn_are_those_of_the_seed():
    runs: list[list] = [[], [], []]
    for run, seed in zip(runs, (1, 1, 2), strict=True):
        evolve(LIMITS, [SEED], kept(run), replace(SHORT, seed=seed))
    assert runs[0] == runs[1] != runs[2]


def test_a_convex_problem_is_solved():
    feasible = [g for g in itertools.product(*(range(m + 1) for m in LIMITS)) if sum(g) == 15]
    outcome = evolve(LIMITS, [SEED], errors, EvolutionSettings(generations=30))
    assert outcome.best == min(feasible, key=error)
    assert outcome.evaluations < len(feasible) / 8
    assert outcome.fitness < outcome.history[0]


def test_mutations_move_no_more_levels_than_they_may():
    seen: list = []
    settings = EvolutionSettings(
        population=1, offspring=8, generations=1, survivors=1, max_levels=2, switches=1
    )
    evolve([50] * 6, [(25,) * 6], kept(seen), settings)
    moves = [sum(abs(level - 25) for level in genome) // 2 for genome in seen[1:]]
    assert set(moves) == {1, 2}


def test_children_of_one_generation_differ():
    settings = EvolutionSettings(
        population=1, offspring=8, generations=1, survivors=1, max_levels=1, switches=1
    )
    for seed in range(5):
        outcome = evolve([50] * 6, [(25,) * 6], errors, replace(settings, seed=seed))
        assert outcome.evaluations == 9  # of the 30 neighbours; 8 free draws would collide


def test_every_generation_draws_other_numbers(tmp_path):
    states = []
    for generations in range(4):
        settings, path = replace(SHORT, generations=generations), tmp_path / "state.json"
        evolve(LIMITS, [SEED], errors, settings, state=path)
        states.append(json.loads(path.read_text())["random"]["state"]["state"])
    assert len(set(states)) == 4


def test_of_equals_the_first_evaluated_stays(tmp_path):
    seen: list = []

    def evaluate(genomes):
        seen.extend(genomes)
        return [1.0] * len(genomes)

    outcome = evolve(LIMITS, [SEED], evaluate, SHORT, state=tmp_path / "state.json")
    assert outcome.best == SEED
    parents = json.loads((tmp_path / "state.json").read_text())["parents"]
    assert [tuple(genome) for genome in parents] == seen[: SHORT.survivors]


def test_the_best_is_never_lost():
    best = evolve(LIMITS, [SEED], errors, EvolutionSettings(generations=30)).best
    outcome = evolve(LIMITS, [SEED, best], errors, replace(SHORT, survivors=1))
    assert outcome.best == best
    assert set(outcome.history) == {error(best)}


@pytest.mark.parametrize(
    "limits, only", [((), ()), ((7,), (3,)), ((2, 4), (2, 4)), ((3, 0), (1, 0))]
)
def test_a_single_feasible_genome_is_returned(limits, only):
    seen: list = []
    outcome = evolve(limits, [only], kept(seen), SHORT)
    assert (outcome.best, outcome.evaluations, seen) == (only, 1, [only])
    assert outcome.history == (error(only),) * (SHORT.generations + 1)


class Killed(BaseException):
    pass


def test_killed_after_any_write_it_ends_the_same(tmp_path, monkeypatch):
    """The file changes only by whole writes, so these are all the states a kill can leave."""
    whole_seen: list = []
    whole = evolve(LIMITS, [SEED], kept(whole_seen), SHORT)
    write = state_module.write_text
    for last in itertools.count(1):

        def killing(path, text, last=last, writes=itertools.count(1)):  # noqa: B008
            write(path, text)
            if next(writes) == last:
                raise Killed

        monkeypatch.setattr(state_module, "write_text", killing)
        seen, path = [], tmp_path / f"{last}.json"
        try:
            evolve(LIMITS, [SEED], kept(seen), SHORT, state=path)
            break
        except Killed:
            pass
        resumed = evolve(LIMITS, [SEED], kept(seen), SHORT, state=path)
        assert found(resumed) == found(whole)
        assert seen == whole_seen
    # The empty state, then every batch and every generation.
    assert last - 1 == 1 + 3 + 2 * SHORT.generations + 1 + SHORT.generations


#: The package itself loads torch; the search needs none of it, and starts in a moment without.
SCRIPT = """
import sys, time, types
from pathlib import Path
package = types.ModuleType("mosaicdiff")
package.__path__ = [sys.argv[1]]
sys.modules["mosaicdiff"] = package
from mosaicdiff.search import EvolutionSettings, evolve
limits, seed, weights, settings = eval(sys.argv[3])
def evaluate(genomes):
    print(len(genomes), flush=True)
    time.sleep(0.003 * len(genomes))
    return [sum(w * x**1.5 for w, x in zip(weights, genome)) for genome in genomes]
heavy = {"torch", "diffusers", "click"} & set(sys.modules)
evolve(limits, [seed], evaluate, EvolutionSettings(**settings), state=Path(sys.argv[2]))
print("heavy", *heavy)
"""


def start(path: Path, settings: EvolutionSettings) -> subprocess.Popen:
    package = str(Path(mosaicdiff.__file__).parent)
    what = repr((LIMITS, SEED, WEIGHTS, vars(settings)))
    command = [sys.executable, "-c", SCRIPT, package, str(path), what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_sigkill_costs_at_most_a_batch(tmp_path):
    # So many generations that a slow machine is still at it when the signal comes.
    settings = replace(SHORT, generations=40)
    whole = evolve(LIMITS, [SEED], errors, settings)
    path, paid = tmp_path / "folder" / "state.json", 0
    for batches, pause in ((2, 0.0), (6, 0.004)):
        process = start(path, settings)
        asked = [int(process.stdout.readline()) for _ in range(batches)]
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        asked += [int(line) for line in process.stdout.read().split()]
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        paid += sum(asked)
        known = len(json.loads(path.read_text())["memo"])
        assert paid - SHORT.batch <= known < whole.evaluations
        paid = known
    seen: list = []
    assert found(evolve(LIMITS, [SEED], kept(seen), settings, state=path)) == found(whole)
    assert len(seen) == whole.evaluations - known


def test_the_search_needs_neither_torch_nor_diffusers(tmp_path):
    out, _ = start(tmp_path / "state.json", SHORT).communicate()
    assert out.splitlines()[-1] == "heavy"


class Clock:
    """Time that passes only while genomes are evaluated: a second each."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(evolution, "monotonic", lambda: self.now)

    def evaluate(self, genomes):
        self.now += len(genomes)
        return errors(genomes)


def test_the_time_is_kept_over_all_runs(tmp_path, monkeypatch):
    whole, clock, path = evolve(LIMITS, [SEED], errors, SHORT), Clock(monkeypatch), tmp_path / "s"
    spent = []
    for seconds in (5, 8, 13, 30):
        outcome = evolve(LIMITS, [SEED], clock.evaluate, SHORT, seconds=seconds, state=path)
        assert not outcome.complete
        assert outcome.seconds == outcome.evaluations == clock.now
        assert seconds <= outcome.seconds < seconds + SHORT.batch
        assert outcome.history[0] >= outcome.history[-1] >= outcome.fitness == error(outcome.best)
        spent.append((outcome.generations, len(outcome.history)))
    assert spent == [(0, 1), (0, 1), (0, 1), (3, 4)]
    again = evolve(LIMITS, [SEED], clock.evaluate, SHORT, seconds=30, state=path)
    assert again == outcome
    resumed = evolve(LIMITS, [SEED], clock.evaluate, SHORT, seconds=1000, state=path)
    assert found(resumed) == found(whole) and resumed.seconds == whole.evaluations


def test_without_time_the_seeds_are_evaluated_all_the_same():
    seeds = [SEED, (3, 2, 3, 2, 3, 2), (2, 3, 3, 2, 2, 3), (1, 4, 3, 2, 3, 2), (2, 3, 2, 3, 3, 2)]
    seen: list = []
    outcome = evolve(LIMITS, seeds, kept(seen), replace(SHORT, batch=1), seconds=0)
    assert seen == seeds
    assert outcome.fitness == min(errors(seeds)) and outcome.history == (outcome.fitness,)
    assert not outcome.complete and outcome.generations == 0


def test_a_finished_search_is_extended_and_is_not_cut_short(tmp_path):
    path, more = tmp_path / "state.json", replace(SHORT, generations=9)
    evolve(LIMITS, [SEED], errors, SHORT, state=path)
    extended = evolve(LIMITS, [SEED], errors, more, state=path)
    assert found(extended) == found(evolve(LIMITS, [SEED], errors, more))
    seen: list = []
    assert found(evolve(LIMITS, [SEED], kept(seen), SHORT, state=path)) == found(extended)
    assert not seen


@pytest.mark.parametrize(
    "what, change",
    [
        ("fingerprint", {"fingerprint": "b"}),
        ("limits", {"limits": (6, 6, 4, 6, 5, 6)}),
        ("seeds", {"seeds": [(3, 2, 3, 2, 3, 2)]}),
        ("settings", {"settings": replace(SHORT, offspring=7)}),
    ],
)
def test_a_state_of_another_search_is_refused(tmp_path, what, change):
    path = tmp_path / "state.json"
    same = {"limits": LIMITS, "seeds": [SEED], "settings": SHORT, "fingerprint": "a"}
    evolve(evaluate=errors, state=path, **same)
    before = path.read_text()
    with pytest.raises(ValueError, match=rf"state\.json, of other {what}\. Delete it, or choose"):
        evolve(evaluate=errors, state=path, **{**same, **change})
    assert path.read_text() == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1'])
def test_what_is_no_state_is_refused(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a file that evolve wrote, got .*state\.json.*Delete it"):
        evolve(LIMITS, [SEED], errors, SHORT, state=path)
    assert path.read_text() == content


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_error_that_is_not_finite_names_the_genome(tmp_path, bad):
    path, seen = tmp_path / "state.json", []

    def evaluate(genomes):
        seen.extend(genomes)
        return [bad if seen[17:18] == [genome] else 1.0 for genome in genomes]

    with pytest.raises(ValueError, match="finite errors, got -?(nan|inf) for genome") as caught:
        evolve(LIMITS, [SEED], evaluate, SHORT, state=path)
    assert str(seen[17]) in str(caught.value)
    memo = json.loads(path.read_text())["memo"]
    assert [tuple(genome) for genome, value in memo if value == 1.0] == seen[: len(memo)]
    assert len(memo) > SHORT.population


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seeds": []}, "seeds must be at least one genome, got none"),
        ({"seeds": [(1, 2)]}, r"seeds must be whole levels from 0 .* got \(1, 2\)"),
        ({"seeds": [(2, 3, 4, 2, 3, 1)]}, r"from 0 to the limits .* got \(2, 3, 4"),
        ({"seeds": [(-1, 6, 3, 2, 3, 2)]}, r"from 0 to the limits .* got \(-1,"),
        ({"seeds": [(2.0, 3, 3, 2, 3, 2)]}, r"whole levels .* got \(2\.0,"),
        ({"seeds": [SEED, (2, 3, 3, 2, 3, 3)]}, "one sum, 15 as the first, got 16"),
        ({"limits": (6, 6, 3, 6, 5, -1)}, "limits must be whole numbers of at least 0, got -1"),
        ({"limits": (6, 6, 3, 6, 5, 6.5)}, r"limits must be whole numbers .* got 6\.5"),
        ({"seconds": -1}, "seconds must be at least 0, got -1"),
        ({"seconds": float("nan")}, "seconds must be at least 0, got nan"),
        ({"evaluate": lambda genomes: [1.0]}, "one error for each of 4 genomes, got 1"),
    ],
)
def test_refusals(change, message):
    good = {"limits": LIMITS, "seeds": [SEED], "evaluate": errors, "settings": SHORT}
    with pytest.raises(ValueError, match=f"^evolve: .*{message}"):
        evolve(**{**good, **change})


@pytest.mark.parametrize("name", list(vars(EvolutionSettings())))
@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"EvolutionSettings: {name} must be .* got {value}"):
        EvolutionSettings(**{name: value})


def test_progress_shows_the_best_so_far(tmp_path):
    path, told = tmp_path / "state.json", []
    outcome = evolve(LIMITS, [SEED], errors, SHORT, state=path, advance=told.append)
    assert [p.evaluations for p in told[:4]] == [4, 8, 9, 13]
    assert [(p.generation, p.done, p.total) for p in told[:4]] == [
        (0, 4, 9), (0, 8, 9), (0, 9, 9), (1, 4, 6),
    ]  # fmt: skip
    assert all(p.generations == SHORT.generations for p in told)
    memo = [value for _, value in json.loads(path.read_text())["memo"]]
    assert [p.fitness for p in told] == [min(memo[: p.evaluations]) for p in told]
    last = told[-1]
    assert (last.generation, last.done) == (SHORT.generations, last.total)
    assert last.fitness == outcome.fitness and 0 <= last.seconds <= outcome.seconds


def test_a_generation_of_nothing_new_is_told_too():
    told: list = []
    evolve((7,), [(3,)], errors, SHORT, advance=told.append)
    assert [p.generation for p in told] == list(range(SHORT.generations + 1))
