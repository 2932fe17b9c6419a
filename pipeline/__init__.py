"""The rooms, in the order of the data's way. Stages are plain classes; only ``pipeline.engine`` knows Ray."""
