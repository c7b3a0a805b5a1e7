"""Calls spread over the workers of a Ray cluster."""

from dit_sparse.cluster.connection import connect
from dit_sparse.cluster.pool import ActorPool, NoWorkers, WorkerLost, map_over_actors, portable

__all__ = ["ActorPool", "NoWorkers", "WorkerLost", "connect", "map_over_actors", "portable"]
