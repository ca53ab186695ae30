"""Files of tuned settings, made of outcomes."""

from collections.abc import Mapping, Sequence

from ttt_harness.tuned import Asked, BaseModel, Candidate, Tuned

IN_CONTEXT = Candidate("icl", {"method": "icl"})


def candidate(lr: float, epochs: int = 1, seconds: float = 10.0, **others: object) -> Candidate:
    """A setting of the method `ttt`."""
    return Candidate(f"lr={lr}, epochs={epochs}", {"method": "ttt", "lr": lr, "epochs": epochs, **others}, seconds)


def tuned(
    tasks: Mapping[str, Mapping[str, Sequence[int]]],
    candidates: Sequence[Candidate],
    *,
    orders: int = 1,
    seed: int = 42,
    fingerprint: str = "0" * 64,
    k: int = 10,
) -> Tuned:
    """A file of one seed; outcomes are listed by demonstration and, within it, by order."""
    return Tuned(
        base_model=BaseModel("tiny", fingerprint),
        method="ttt",
        k=k,
        seeds=(seed,),
        folds=5,
        orders=orders,
        dtype="float32",
        versions={"torch": "2.13.0"},
        candidates=(IN_CONTEXT, *candidates),
        tasks={
            task: {
                name: {Asked(seed, place // orders, place % orders): right for place, right in enumerate(found)}
                for name, found in tried.items()
            }
            for task, tried in tasks.items()
        },
    )
