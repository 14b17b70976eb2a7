"""Numbers that say how a model behaves without any annotation: in come label maps of a video, out come shares in [0, 1]."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from data_pipeline.errors import DataError
from trainer.metrics.segmentation import adjusted_rand, contingency


def used_slots(labels: Tensor, num_slots: int) -> float:
    """Share of slots that win at least one patch (or pixel) anywhere in the video; labels of any shape."""
    return len(np.unique(labels.cpu().numpy())) / num_slots


def label_agreement(one: Tensor, other: Tensor) -> float:
    """ARI between two labellings of the same patches, nothing left out; symmetric in its arguments.

    Shapes: both (T, P). With attention and object labels of a video: how far the two maps tell the same story.
    Source: our reading of "sym-ARI" of SSync Table 1, which gives no formula. Differs: a share, not percent.
    """
    if one.shape != other.shape:
        raise DataError(f"labels have shapes {list(one.shape)} and {list(other.shape)}; both must be one size [T, P]")
    tables = contingency(one.cpu().numpy()[..., None], other.cpu().numpy()[..., None])
    return adjusted_rand(tables.sum(axis=0))
