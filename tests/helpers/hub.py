"""A package datasets that reads no network."""

import sys
import types

from dph.data import sources


def fake_hub(monkeypatch, load_dataset, reachable=True):
    """Replace the package datasets by one with this ``load_dataset``; return it."""
    fake = types.ModuleType("datasets")
    fake.load_dataset, fake.config = load_dataset, types.SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(sources, "_is_reachable", lambda url: reachable)
    return fake
