"""Single edits with valid values over all artefacts of a run: each must be found and named, or change nothing.

    python checks/edit_artefacts.py --work /tmp/edits --count 200 --seed 0

Makes a small run of the embedded target first (answers, features, a training state, a drafter, a calibration, a step rate), then
changes one value at a time, as a hand or a disk would: a number by a little, a letter, a true into a false, a bit of a tensor;
reads the artefact as the stages do, and puts it back. Prints one line of JSON; exit code 1 when an edit was neither found nor
harmless.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from draftkit.draft.checkpoint import load_drafter, open_drafter, read_provenance
from draftkit.errors import DraftkitError, ScheduleError
from draftkit.features.store import FeatureStore
from draftkit.schedule.calibration import load_calibration
from draftkit.schedule.step_rate_table import load_step_rate
from draftkit.target.transformers import load_target
from draftkit.train.folder import read_folder
