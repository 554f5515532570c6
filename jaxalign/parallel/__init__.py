"""Where arrays lie: meshes, layout rules, sharding, hosts and their memory."""
