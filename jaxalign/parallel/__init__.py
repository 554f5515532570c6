"""Placement of arrays: meshes, sharding rules, shard_map helpers, host rows, host memory."""
