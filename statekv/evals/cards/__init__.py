"""Films that the package makes itself, and questions about them."""

from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import Story, write_story

__all__ = ["Story", "write_film", "write_story"]
