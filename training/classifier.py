"""A nearest-centroid classifier of sounds on log-mel statistics, and the spread of a class.

Used to judge generated clips, so it must not hang on details that a vocoder changes: log-mels are
smoothed in time and compressed so that quiet bins count little, and the whitening is shrunk.
"""

from dataclasses import dataclass

import numpy as np
import torch

# a bin x log units below the loudest counts exp(COMPRESSION * x). Measured on real test clips with
# a noise floor 3.5 log units below the peak: 0.90 right at 0.8, 0.75 at 0.5, 0.61 for clamped logs
COMPRESSION = 0.7
# frames averaged before anything else: 40 ms keeps rhythms and drops a vocoder's frame noise
SMOOTHING = 4
MODULATION_FLOOR = 0.0005  # variance a frame
FRAMES_PER_SECOND = 100.0 / SMOOTHING
MODULATION_BANDS_HZ = ((0.3, 1.0), (1.0, 2.0), (2.0, 4.0), (4.0, 6.5), (6.5, 12.6))
_EPS = 1e-6


def features(log_mel: torch.Tensor) -> np.ndarray:
    """Summarise log-mel spectrograms by statistics over time.

    Per mel bin: mean, standard deviation, and standard deviation of frame differences; per
    modulation band and quarter of the mel axis: the share of the level's variation in that band.
    The level of the clip is subtracted, so a sound is the same sound when quieter.

    Args:
        log_mel: float [B, T, 64], natural logarithm of mel magnitudes.

    Returns:
        float32 [B, 212]: 3 x 64 bin statistics, then 4 x 5 modulation shares.

    Raises:
        ValueError: if log_mel is not three-dimensional with 64 bins.
    """
    if log_mel.dim() != 3 or log_mel.shape[2] != 64:
        raise ValueError(f"log_mel must be [batch, frames, 64], got shape {tuple(log_mel.shape)}")
    x = torch.nn.functional.avg_pool1d(log_mel.float().transpose(1, 2), SMOOTHING).transpose(1, 2)
    x = torch.exp(COMPRESSION * (x - x.amax(dim=(1, 2), keepdim=True)))  # [B, T / 4, 64] in (0, 1]
    statistics = [x.mean(1), x.std(1), x.diff(dim=1).std(1)]
    quarters = x.unflatten(2, (4, 16)).mean(3)  # [B, T, 4]
    power = torch.fft.rfft(quarters - quarters.mean(1, keepdim=True), dim=1).abs() ** 2
    hz = torch.fft.rfftfreq(x.shape[1], 1.0 / FRAMES_PER_SECOND).to(x.device)
    bands = torch.stack(
        [power[:, (hz >= low) & (hz < high)].sum(1) for low, high in MODULATION_BANDS_HZ], 2
    )
    # the floor keeps a steady sound's shares near zero instead of random
    shares = bands / (power.sum(1)[:, :, None] + MODULATION_FLOOR * x.shape[1] ** 2 / 2)
    return torch.cat([*statistics, shares.flatten(1)], dim=1).cpu().numpy()


@dataclass
class NearestCentroid:
    """Assigns a clip to the class whose centroid is nearest in a whitened feature space.

    Attributes:
        classes: names, in the order of the centroids.
        mean, scale: float64 [D], z-score of the real training clips.
        whitening: float64 [D, D], inverse square root of the shrunk within-class covariance.
        centroids: float64 [classes, D], in the whitened space.
    """

    classes: list[str]
    mean: np.ndarray
    scale: np.ndarray
    whitening: np.ndarray
    centroids: np.ndarray

    @classmethod
    def fit(
        cls, values: np.ndarray, labels: list[str], shrinkage: float = 0.3
    ) -> "NearestCentroid":
        """Fit centroids and whitening.

        Args:
            values: float [B, D], from `features`.
            labels: the class of each row.
            shrinkage: share of the identity in the within-class covariance; 1 leaves z-scores.
        """
        names, y = np.unique(np.asarray(labels), return_inverse=True)
        values = np.asarray(values, dtype=np.float64)
        mean, scale = values.mean(0), values.std(0) + 0.05
        z = (values - mean) / scale
        centroids = np.stack([z[y == i].mean(0) for i in range(len(names))])
        residual = z - centroids[y]
        covariance = residual.T @ residual / len(z)
        identity = np.eye(len(mean)) * np.trace(covariance) / len(mean)
        eigenvalues, vectors = np.linalg.eigh((1 - shrinkage) * covariance + shrinkage * identity)
        whitening = (vectors / np.sqrt(np.maximum(eigenvalues, _EPS))) @ vectors.T
        return cls(names.tolist(), mean, scale, whitening, centroids @ whitening)

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Features [B, D] to the whitened space of the centroids."""
        return (np.asarray(values, dtype=np.float64) - self.mean) / self.scale @ self.whitening

    def distances(self, values: np.ndarray) -> np.ndarray:
        """Euclidean distance of each row to each centroid: float64 [B, classes]."""
        return np.linalg.norm(self.transform(values)[:, None] - self.centroids[None], axis=2)

    def predict(self, values: np.ndarray) -> list[str]:
        """The class of each row."""
        return [self.classes[i] for i in self.distances(values).argmin(1)]

    def confusion(self, values: np.ndarray, labels: list[str]) -> np.ndarray:
        """Counts, int64 [classes, classes]: rows are true classes, columns predicted ones."""
        table = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        for label, name in zip(labels, self.predict(values), strict=True):
            table[self.classes.index(label), self.classes.index(name)] += 1
        return table

    def spread(self, values: np.ndarray, labels: list[str]) -> dict[str, float]:
        """Mean distance of a class's clips to their own mean, in the whitened space.

        The mean is that of the given clips, not the stored centroid, so that clips which are all
        alike but off-centre count as collapsed. For n clips it is scaled by sqrt(n / (n - 1)).
        """
        z, result = self.transform(values), {}
        for name in self.classes:
            own = z[np.asarray(labels) == name]
            if len(own) > 1:
                distance = np.linalg.norm(own - own.mean(0), axis=1).mean()
                result[name] = float(distance * np.sqrt(len(own) / (len(own) - 1)))
        return result

    def to_dict(self) -> dict[str, np.ndarray]:
        """Arrays for `numpy.savez`; inverse of `from_dict`."""
        return {
            "classes": np.array(self.classes),
            "mean": self.mean,
            "scale": self.scale,
            "whitening": self.whitening,
            "centroids": self.centroids,
        }

    @classmethod
    def from_dict(cls, arrays: dict[str, np.ndarray]) -> "NearestCentroid":
        """Rebuild a classifier from the arrays of `to_dict`, or an opened npz file.

        Raises:
            ValueError: if an array is missing or the shapes disagree.
        """
        missing = {"classes", "mean", "scale", "whitening", "centroids"} - set(arrays)
        if missing:
            raise ValueError(f"classifier lacks {', '.join(sorted(missing))}")
        keys = ("mean", "scale", "whitening", "centroids")
        values = [np.asarray(arrays[key], dtype=np.float64) for key in keys]
        model = cls([str(name) for name in arrays["classes"]], *values)
        n_features, n_classes = len(model.mean), len(model.classes)
        shapes = (model.whitening.shape, model.centroids.shape)
        if shapes != ((n_features, n_features), (n_classes, n_features)):
            raise ValueError(f"classifier arrays disagree: whitening and centroids are {shapes}")
        return model
