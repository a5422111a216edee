"""Input channels: their statistics, their order, the salient set and its size."""
