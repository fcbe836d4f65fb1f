"""How often the tests of `fastalign.stats` find something where there is nothing, and where there is something.

Run it with `python -m bench.suites.false_alarms`; it prints the table of docs/explanation/statistics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from fastalign import stats

REPEATS = 1000


def models(change: float = 0.0, items: int = 300) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Outcomes of two models on the same items, some hard and some easy for both."""
    rng = np.random.default_rng(0)
    for _ in range(REPEATS):
        hardness = 2 * rng.normal(size=items)
        yield hardness + rng.normal(size=items) > 0, hardness + rng.normal(size=items) + change > 0


def coins(probability: float, length: int = 2000) -> Iterator[np.ndarray]:
    """Streams of outcomes with one probability."""
    rng = np.random.default_rng(1)
    return ((rng.random(length) < probability).astype(float) for _ in range(REPEATS))


def clouds(shift: float, rows: int = 60, columns: int = 16) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two samples of a normal distribution, the second one moved."""
    rng = np.random.default_rng(2)
    for _ in range(REPEATS):
        yield rng.normal(size=(rows, columns)), rng.normal(size=(rows, columns)) + shift


def share(found: Iterator[bool]) -> float:
    """The share of true values."""
    return float(np.mean(list(found)))


def unpaired(a: np.ndarray, b: np.ndarray) -> bool:
    """The z test that treats two models as unrelated, at 5 %."""
    p, q = a.mean(), b.mean()
    return abs(q - p) > 1.96 * ((p * (1 - p) + q * (1 - q)) / len(a)) ** 0.5


def at_looks(values: np.ndarray, looks: int) -> bool:
    """Whether a one-sided z test at 5 % rejects a mean of 1/2 at any of equally spaced looks."""
    n = np.linspace(len(values) / looks, len(values), looks).astype(int)
    return bool(((np.cumsum(values)[n - 1] - n / 2) / np.sqrt(n / 4) > 1.645).any())


def excludes(interval: stats.Interval) -> bool:
    """Whether an interval leaves out "no change"."""
    return not interval.low <= 0 <= interval.high


def rows() -> Iterator[tuple[str, float, str, float]]:
    """(test, alarms without a difference, the difference, share found)."""
    paired: dict[str, Callable[[np.ndarray, np.ndarray], bool]] = {
        "`mcnemar`": lambda a, b: stats.mcnemar(a, b) <= 0.05,
        "`newcombe` leaves out 0": lambda a, b: excludes(stats.newcombe(a, b)),
        "`paired_bootstrap` leaves out 0": lambda a, b: excludes(stats.paired_bootstrap(a, b, repeats=1000)),
        "unpaired z test, for comparison": unpaired,
    }
    for name, test in paired.items():
        yield (
            name,
            share(test(a, b) for a, b in models()),
            "+6 points of 300 items",
            share(test(a, b) for a, b in models(0.35)),
        )
    streams: dict[str, Callable[[np.ndarray], bool]] = {
        "`e_process` reaches 20, looked at 2,000 times": lambda x: bool((stats.e_process(x, 0.5) >= 20).any()),
        "`confidence_sequence` leaves out 1/2 at any look": lambda x: bool(
            ((limits := stats.confidence_sequence(x))[0] > 0.5).any() or (limits[1] < 0.5).any()
        ),
        "z test at 20 looks, for comparison": lambda x: at_looks(x, 20),
    }
    for name, sequential in streams.items():
        yield name, share(map(sequential, coins(0.5))), "mean 0.55 for 0.5", share(map(sequential, coins(0.55)))
    for statistic in ("energy", "mmd", "auc"):
        none, some = (
            share(stats.two_sample_test(x, y, statistic, permutations=99).p_value <= 0.05 for x, y in clouds(shift))
            for shift in (0.0, 0.25)
        )
        yield f'`two_sample_test`, "{statistic}"', none, "0.25 sd in each of 16 columns, 60 rows each", some


def main() -> None:
    """Prints the table."""
    print("| test | alarms without a difference | with | found |\n| --- | --- | --- | --- |")
    for name, alarms, difference, found in rows():
        print(f"| {name} | {alarms:.1%} | {difference} | {found:.1%} |", flush=True)


if __name__ == "__main__":
    main()
