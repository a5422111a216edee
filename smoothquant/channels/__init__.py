"""Input channels: statistics, the order and the salient set chosen from them, their budget."""
