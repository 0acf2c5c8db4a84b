"""CLAP, read by transformers from a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq4adm.errors import CheckpointError, MissingComponentError
from ptq4adm.evaluation.embeddings import Embedded
from ptq4adm.evaluation.weights import file_hash
from ptq4adm.models.pickled import few

_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


class ClapEmbedding:
    """Embedding: CLAP's projected audio vectors, of length 1; no classes.

    Clips longer than the model's window (10 s) are cut into windows, and the vectors averaged.

    Args:
        weights: a folder with `config.json`, `preprocessor_config.json` and `model.safetensors`, as
            laion/clap-htsat-unfused has; only its folder's name tells two CLAPs apart, and the
            hash.

    Raises:
        MissingComponentError: if the folder lacks a file.
        CheckpointError: if the weights are not all of that model.
    """

    classes: tuple[str, ...] | None = None

    def __init__(self, weights: str | Path) -> None:
        folder = Path(weights)
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if missing:
            raise MissingComponentError(
                f"{folder}: lacks {', '.join(missing)}; give a folder of a CLAP model that "
                "transformers reads (for weights as .bin, save_pretrained writes .safetensors)"
            )
        from transformers import ClapFeatureExtractor, ClapModel

        try:
            # safetensors only: nothing in the folder is executed
            model, found = ClapModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: cannot be read as a CLAP model ({error}); copy the whole folder again"
            ) from error
        wrong = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
        if wrong:
            raise CheckpointError(
                f"{folder}: weights and model differ in {few(map(str, wrong))}; "
                "it is another model, or not the whole of it"
            )
        self._model: Any = model.eval()
        self._extractor: Any = ClapFeatureExtractor.from_pretrained(folder, local_files_only=True)
        self.name = f"clap:{folder.resolve().name}"
        self.weights = file_hash(folder / "model.safetensors")
        self.sample_rate = int(self._extractor.sampling_rate)
        self.dimension = int(model.config.projection_dim)

    @torch.no_grad()
    def embed(self, waveforms: Tensor) -> Embedded:
        """Embed float32 [B, S] at `sample_rate`."""
        window = int(self._extractor.nb_max_samples)
        # transformers cuts a longer clip at a random place
        found = [self._embed(piece) for piece in waveforms.float().cpu().split(window, dim=1)]
        return Embedded(torch.stack(found).mean(0))

    def _embed(self, waveforms: Tensor) -> Tensor:
        inputs = self._extractor(
            list(waveforms.numpy()), sampling_rate=self.sample_rate, return_tensors="pt"
        )
        output = self._model.get_audio_features(**inputs)
        # a tensor, or since transformers 5 the output that holds it
        vectors: Tensor = output if isinstance(output, Tensor) else output.pooler_output
        return torch.nn.functional.normalize(vectors, dim=1)
