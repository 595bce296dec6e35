"""Token pruning as data: scorers, restorers, the plan and the sandwich around any function of tokens."""

from autoprune.pruning.restorers import cached
from autoprune.pruning.scorers import dc, random

SCORERS = {"dc": dc, "random": random}
RESTORERS = {"cached": cached}
