# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a labelling server needs, which builds a workflow once and goes on with it while models are trained."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from monai.config import KeysCollection
from monai.transforms import Compose

from ..transforms.preprocessing import volume_preprocessing
from ..weights.transfer import trained_settings

__all__ = ["ModelPreprocessing"]


class ModelPreprocessing(Compose):
    """The chain of :func:`common.transforms.volume_preprocessing`, as the model that is served now was trained.

    MONAI Label evaluates a config once, when it starts. Spacing and normalisation that were found in the training data
    are not known before the first training and may change with every further one, so in such a server the JSON beside
    the model is read again at each use. A run on the command line keeps the settings that it began with.

    Args:
        model: file of the model, a list of them, or a pattern with ``*``.
        keys: as in ``volume_preprocessing``.
        settings: as in ``volume_preprocessing``, where the JSON does not say otherwise.
    """

    def __init__(self, model: str | Sequence[str], *, keys: KeysCollection = ("image",), **settings: Any) -> None:
        self.model, self.keys, self.settings = model, keys, settings
        super().__init__(volume_preprocessing(keys, **settings).transforms)

    @property
    def transforms(self) -> Sequence[Any]:
        """The steps of the chain."""
        if "monailabel" in sys.modules:
            trained = trained_settings(self.model)
            settings = {name: trained.get(name, value) for name, value in self.settings.items()}
            if settings != self.settings:
                self.settings, self._steps = settings, volume_preprocessing(self.keys, **settings).transforms
        return self._steps

    @transforms.setter
    def transforms(self, steps: Sequence[Any]) -> None:
        self._steps = steps
