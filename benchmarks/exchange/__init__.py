"""Token exchange between nodes that a slow link joins: flat all-to-all beside the topology-aware one."""
