"""Networks, and the mathematics around them."""

from pipeline.lean import import_open_clip_without_timm

import_open_clip_without_timm()
