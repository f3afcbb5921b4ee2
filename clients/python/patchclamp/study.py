"""From a few examples to a calibrated, tested program: one object that walks the loop.

study = VectorStudy(client, "joyful", pairs)
study.extract(pooling="mean")
study.calibrate(["My day at work was", ...], instruction="Be joyful.")
study.detect()
client.generate("The weather today is", program=study.program()).result()

Each step is a call of Client, takes its options, and keeps what it returned; what a step may do differently, the call
does. Some pairs are kept out of the vector, and it is tested on them alone.
"""

import dataclasses
import random
from collections.abc import Callable, Iterable
from typing import Any, Unpack

from patchclamp import effects, requests
from patchclamp.client import Client
from patchclamp.fields import several
from patchclamp.keywords import takes_options_of
from patchclamp.monitoring import Threshold, watch_direction
from patchclamp.names import CalibrationApplicationName, MethodName
from patchclamp.programs import Program, add, read_projection, replace, rotate_towards
from patchclamp.programs.scopes import ScopeLike
from patchclamp.prompts import PromptLike
from patchclamp.requests import CalibrateVectorOptions, DetectConceptOptions, ExtractOptions
from patchclamp.results import CalibrationResult, ConceptDetection, ExtractionResult
from patchclamp.v1 import monitoring_pb2
from patchclamp.v1 import program_pb2 as pb

# Two of either side calibrate the probabilities of a detector, and two test it.
MIN_HELD_OUT = 4
# What a classifier of words needs of either side.
MIN_PAIRS = 4


class VectorStudy:
    """Finds, calibrates and tests the vector of `name`, the tag under which it is stored.

    extraction, calibration, detection: what the steps returned; None before. pairs, held_out: those that the vector is
    made of, and those that it is tested on.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        pairs: Iterable[tuple[PromptLike, PromptLike]],
        *,
        test_fraction: float = 0.25,
        seed: int = 0,
        replace_tags: bool = False,
        on_event: Callable[[Any], object] | None = None,
    ) -> None:
        """pairs: (positive, negative). test_fraction: share of them that is kept for the test, at least 4. on_event
        sees what the steps stream, such as their progress. Raises ValueError for too few pairs."""
        listed = several(pairs, "pairs", "(positive, negative)")
        if not 0.0 < test_fraction < 1.0:
            raise ValueError(f"test_fraction: expected a number between 0 and 1, both excluded, got {test_fraction}")
        n = max(MIN_HELD_OUT, round(test_fraction * len(listed)))
        if len(listed) - n < MIN_PAIRS:
            raise ValueError(
                f"pairs: {n} of {len(listed)} are kept for the test, and at least {MIN_PAIRS} make the vector; give "
                f"{n + MIN_PAIRS} or more"
            )
        random.Random(seed).shuffle(listed)
        self.client, self.name, self.seed = client, name, seed
        self.held_out, self.pairs = listed[:n], listed[n:]
        self.extraction: ExtractionResult | None = None
        self.calibration: CalibrationResult | None = None
        self.detection: ConceptDetection | None = None
        self._replace_tags, self._on_event = replace_tags, on_event
        # How the vector was calibrated.
        self._application: CalibrationApplicationName = "add"
        self._scope: ScopeLike | None = None

    @takes_options_of(requests.extract_vectors)
    def extract(
        self, method: MethodName = "difference_of_means", **options: Unpack[ExtractOptions]
    ) -> ExtractionResult:
        """Finds the vector and stores it under the name."""
        options["tags"] = [self.name, *options.get("tags", ())]
        # Once a vector is found, the name is the study's own.
        options.setdefault("replace_tags", self._replace_tags or self.extraction is not None)
        options.setdefault("seed", self.seed)
        found = self.client.extract_vectors(self.pairs, method, **options).result(self._on_event)
        self.extraction, self.calibration, self.detection = found, None, None
        return found

    @takes_options_of(requests.calibrate_vector)
    def calibrate(self, prompts: Iterable[PromptLike], **options: Unpack[CalibrateVectorOptions]) -> CalibrationResult:
        """Chooses layer and strength on prompts that are continued. The name is then that of the vector with both.

        By default the layer is the best of the evidence, and the effect how probable a text is of the positive side, to
        a classifier of words that the pairs of the vector train.
        """
        found = self._extracted("calibrate")
        options.setdefault("layers", [found.best_layer])
        options.setdefault("seed", self.seed)
        if options.get("effect") is None:
            options["effect"] = effects.classifier(_sides(self.pairs), "positive")
        vector = found.artifact.id
        result = self.client.calibrate_vector(vector, prompts, **options).result(self._on_event)
        # The name is the study's own by now; other tags that were asked for may be somebody's.
        artifact = self.client.tag_artifact(self.name, result.artifact.id, replace=True)
        self.calibration = dataclasses.replace(result, artifact=artifact)
        self._application, self._scope = options.get("application", "add"), options.get("scope")
        return self.calibration

    @takes_options_of(requests.detect_concept)
    def detect(self, **options: Unpack[DetectConceptOptions]) -> ConceptDetection:
        """Tests on the pairs that were kept out how well the vector tells both sides apart, by layer and pooling."""
        self._extracted("detect")
        options.setdefault("seed", self.seed)
        texts = _sides(self.held_out)
        self.detection = self.client.detect_concept(self.name, texts, "positive", **options).result(self._on_event)
        return self.detection

    def program(self, *, layer: int | None = None, strength: float | None = None) -> Program:
        """Returns the edit at the knee of the calibration, or at a layer and strength of yours, and a readout of the
        projection at the layer that detects best, without a detection at the layer of the edit.

        Raises ValueError where there is no calibration, or none that found a strength, and none was given.
        """
        self._extracted("program")
        if layer is None or strength is None:
            if self.calibration is None:
                raise ValueError("program: calibrate first, or give layer and strength")
            if self.calibration.strength == 0.0 and strength is None:
                raise ValueError("program: no safe strength had an effect (calibration.warnings); give a strength")
            layer = self.calibration.layer if layer is None else layer
            strength = self.calibration.strength if strength is None else strength
        readout = read_projection([self.name], layers=self._watched(layer), name=self.name)
        return Program(self._edit(layer, strength), readouts=readout)

    def watch_item(self, *, threshold: Threshold | None = None) -> monitoring_pb2.WatchItem:
        """Returns an item of a watch: the projection at the layer that detects best."""
        found = self._extracted("watch_item")
        layer = found.best_layer if self.calibration is None else self.calibration.layer
        return watch_direction(self.name, self.name, layers=self._watched(layer), threshold=threshold)

    def __str__(self) -> str:
        """Says what is known so far, a line for each step."""
        lines = [f"{self.name}: {len(self.pairs)} pairs, and {len(self.held_out)} for the test"]
        if self.extraction is not None:
            best = next(each for each in self.extraction.layers if each.layer == self.extraction.best_layer)
            lines.append(
                f"extracted: layer {best.layer}, held-out accuracy {best.heldout_accuracy:.3f}, random "
                f"{best.random_accuracy:.3f}"
            )
        if self.calibration is not None:
            lines.append(
                f"calibrated: layer {self.calibration.layer}, strength {self.calibration.strength:g}"
                + (", and the instruction does more" if self.calibration.prompt_wins else "")
            )
        if self.detection is not None:
            report = self.detection.detectors[self.detection.best]
            lines.append(
                f"tested: AUROC {report.auroc} at layer {report.layer}, pooling {report.pooling}; random "
                f"{report.random_auroc:.3f}"
            )
        return "\n".join(lines)

    def _extracted(self, step: str) -> ExtractionResult:
        if self.extraction is None:
            raise ValueError(f"{step}: extract first")
        return self.extraction

    def _watched(self, layer: int) -> int:
        return layer if self.detection is None else self.detection.detectors[self.detection.best].layer

    def _edit(self, layer: int, strength: float) -> pb.Edit:
        match self._application:
            case "rotate_towards":
                return rotate_towards(self.name, strength, layers=layer, scope=self._scope, name=self.name)
            case "replace":
                return replace(self.name, strength=strength, layers=layer, scope=self._scope, name=self.name)
            case _:
                return add(self.name, strength=strength, layers=layer, scope=self._scope, name=self.name)


def _sides(pairs: Iterable[tuple[PromptLike, PromptLike]]) -> dict[str, list[PromptLike]]:
    positives, negatives = zip(*pairs, strict=True)
    return {"positive": list(positives), "negative": list(negatives)}
