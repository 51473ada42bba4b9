"""A simulated fleet: one process that answers on many loopback addresses as nodes would, faults included.

It speaks real SSH and the probe agent's wire format, so that everything above the transport (plans,
limits, peers, verdicts, policies, reports) can be tried on thousands of nodes without one. Nothing that is
sent to it is executed: it reads which checks are wanted and answers them from its scenario.
"""
