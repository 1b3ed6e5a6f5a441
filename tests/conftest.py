"""What all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

# A deadline would be a timing assertion, and these machines are shared.
settings.register_profile("default", deadline=None)
settings.load_profile("default")

# Importing transformers must not look for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
