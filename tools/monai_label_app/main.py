# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""MONAI Label's monaibundle app with two more ways to choose the next scan.

Copy this folder, put exported bundles into its ``model`` folder, and start it as the monaibundle app. It needs MONAI
Label 0.8.5 and nothing else of this collection.

==============  ======================================================================================================
core_set        the scan least like those already labelled, as the bundle's pre-trained encoder sees them, see
                ``core_set.py``; ``--conf embedding_model <bundle>`` names the bundle, the first of ``models`` otherwise
epistemic       the scan on which the trained model is least sure; with ``--conf epistemic_model <bundle>``, whose
                scores the monaibundle app computes, but never chooses by
==============  ======================================================================================================
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from core_set import ScanEmbeddings, farthest_first
from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.main import Main
from monailabel.tasks.activelearning.epistemic import Epistemic

logger = logging.getLogger(__name__)


def _monaibundle() -> Any:
    """Import the app that comes with MONAI Label."""
    file = Path(Main()._get_installed_dir(None, "sample-apps")) / "monaibundle" / "main.py"
    spec = importlib.util.spec_from_file_location("monaibundle_main", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CoreSet(Strategy):
    """Choose the scan farthest from the labelled ones.

    Args:
        embeddings: of the scans.
    """

    def __init__(self, embeddings: ScanEmbeddings) -> None:
        super().__init__(f"Scan least like the labelled ones, by the encoder of {embeddings.bundle.name}")
        self.embeddings = embeddings

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Return the scan's id, its distance, and which scans had to be left out."""
        tag, labels = request.get("label_tag"), request.get("labels")
        unlabelled = datastore.get_unlabeled_images(tag, labels)
        if not unlabelled:
            return None
        labelled = datastore.get_labeled_images(tag, labels)
        try:
            vectors = self.embeddings({scan: datastore.get_image_uri(scan) for scan in [*unlabelled, *labelled]})
        except FileNotFoundError as error:
            raise HTTPException(422, str(error)) from error
        problems = self.embeddings.problems
        for problem in problems.values():
            logger.warning(f"Core set: left out, {problem}")
        chosen = farthest_first(vectors, labelled)
        if chosen is None:
            raise HTTPException(422, "no scan without a label can be read: " + "; ".join(problems.values()))
        return {"id": chosen[0], "distance": chosen[1], "left_out": problems}


# the server looks for a class that names MONAILabelApp itself among its bases
class MyApp(_monaibundle().MyApp, MONAILabelApp):  # type: ignore[misc]
    """The monaibundle app with more strategies."""

    def init_strategies(self) -> dict[str, Strategy]:
        """Add to ``random`` and ``first``."""
        strategies: dict[str, Strategy] = super().init_strategies()
        name = self.conf.get("embedding_model") or next(iter(self.models), None)
        if name:
            bundle = Path(self.model_dir) / name
            strategies["core_set"] = CoreSet(ScanEmbeddings(bundle, Path(self.app_dir) / "embeddings"))
        if self.epistemic_models:
            strategies["epistemic"] = Epistemic()
        return strategies

    def scoring(self, request: dict[str, Any], datastore: Datastore | None = None) -> Any:
        """Score one scan after the other: of two at once, each unloads the code that the other is importing."""
        return super().scoring({"max_workers": 1} | request, datastore)
