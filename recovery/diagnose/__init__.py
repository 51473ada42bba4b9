"""What a stopped job's own traces say: who waits for whom, where each rank stands, how each one ended.

Pure readers and pure decisions. Nothing that a node wrote is executed or unpickled by the standard machinery.
"""
