"""Other libraries' kernels for the same layers, each optional.

A missing one is reported with its reason. All get the same float32 input, the same weights and the
same number of threads; the quantization of activations is part of the timed call of every int8
variant.
"""

from __future__ import annotations

from ptq4adm.bench.peers.base import Peer
from ptq4adm.bench.peers.onnx_runtime import OnnxRuntime
from ptq4adm.bench.peers.open_vino import OpenVino
from ptq4adm.bench.peers.torch_float import TorchFloat
from ptq4adm.bench.peers.torch_int8 import TorchInt8
from ptq4adm.errors import ConfigError

__all__ = ["PEERS", "Peer", "select_peers"]

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        TorchFloat(),
        TorchInt8("fbgemm"),
        TorchInt8("onednn"),
        OnnxRuntime(),
        OpenVino(),
    )
}


def select_peers(names: tuple[str, ...] | None = None) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can run here.

    Args:
        names: which are wanted; None for all.

    Returns:
        peers: those that can run.
        missing: name of each of the others to the reason and the remedy.

    Raises:
        ConfigError: if a name is unknown.
    """
    unknown = sorted(set(names or ()) - set(PEERS))
    if unknown:
        raise ConfigError(f"peer {unknown[0]!r} is unknown: expected some of {', '.join(PEERS)}")
    wanted = [PEERS[name] for name in (PEERS if names is None else names)]
    missing = {peer.name: reason for peer in wanted if (reason := peer.missing()) is not None}
    return [peer for peer in wanted if peer.name not in missing], missing
