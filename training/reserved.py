"""Write the keys of the captions that calibration must not use: the test split's, the held-out ones.

    python training/reserved.py            # ptq4adm/prompts/reserved-audioldm-tiny.txt

The package refuses them by their hashes, so that it need not carry them (`ptq4adm/prompts/domain.py`).
The corpus is planned again, not rendered: its captions follow from the number of clips and the seed.
"""  # noqa: E501 - the path is one word

import argparse
from pathlib import Path

from captions import heldout_prompts
from corpus import plan_clips

from ptq4adm.prompts.domain import reserved_key

OUTPUT = Path(__file__).resolve().parents[1] / "ptq4adm" / "prompts" / "reserved-audioldm-tiny.txt"
CLIPS, SEED = 6000, 0  # of the corpus that the shipped pipeline was trained on
_HEADING = (
    "# Captions kept for evaluation, by key: the test split's and the held-out prompts.\n"
    "# Written by training/reserved.py.\n"
)


def reserved_captions() -> set[str]:
    """Every caption of the test split, and the prompts that training never saw."""
    plans = plan_clips(CLIPS, SEED)
    test = {text for plan in plans if plan.split == "test" for text in plan.captions}
    return test | {text for _, text in heldout_prompts()}


def file_text(captions: set[str]) -> str:
    """The file: one key a line, sorted."""
    return _HEADING + "".join(f"{key}\n" for key in sorted({reserved_key(c) for c in captions}))


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    arguments.output.write_text(file_text(reserved_captions()), encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
