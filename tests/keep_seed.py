"""By hand: what a run says about extension when it is trained with another seed, for chapter 13b.

    python tests/keep_seed.py RUN ABOUT OUT

RUN is the folder of a run with [control] whose [pretrain] has a `seed`; it needs no stage after the
evaluations of both arms. ABOUT is a sentence on how the run differs from the one that is kept. OUT
is the file, such as cmixtral_nb/data/laptop_seed1.json. Nothing is kept of the comparison at equal
time: a second training usually runs beside other work.
"""

import sys
from pathlib import Path

from cmixtral_nb.arms import ARMS, arms_of
from cmixtral_nb.recipes import read_recipe
from cmixtral_nb.run_files import log_rows
from cmixtral_nb.showcase import _points
from cmixtral_nb.stages import Artifact, write_json

KEPT = (  # of `arms_of`
    "language",
    "fault",
    "text",
    "saved",
    "bytes_read",
    "budgets",
    "crossing",
    "context",
    "writing",
)


def seed_numbers(run: Path, about: str) -> dict:
    "The numbers of both arms of a run"
    recipe = read_recipe(str(run / "recipe.toml"))
    found = arms_of(run, recipe["language"], recipe["kept"])
    if not found:
        again = f"run: cmixtral run {run}/recipe.toml --out {run}"
        sys.exit(f"{run}: expected both arms, trained and evaluated; {again}")
    found["budgets"].pop("time", None)
    return dict(
        recipe=recipe["name"],
        seed=Artifact.load(run / ARMS["extended"]).params["seed"],
        about=about,
        control={key: found[key] for key in KEPT},
        points=_points(dict(losses={folder: log_rows(run / folder) for folder in ARMS.values()})),
    )


def main(args: list[str]) -> None:
    if len(args) != 3:
        sys.exit(__doc__)
    write_json(Path(args[2]), seed_numbers(Path(args[0]), args[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
