"""The short classic entry point: python kd_train.py --teacher bert-large --student bert-base --temp 6.0 --alpha 0.7 --data reviews.csv

The same as `limbeck distill --fit-teacher ...`, with all of its options: a teacher whose head does not fit the classes of the data is
fine-tuned on them first (the run says so).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    try:
        from limbeck.cli import console
    except ModuleNotFoundError as error:
        if error.name != "limbeck":
            raise
        sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
        from limbeck.cli import console
    console(["distill", "--fit-teacher", *sys.argv[1:]], program="kd_train.py")
