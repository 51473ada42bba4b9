"""Numerical validation: a device, dtype and kernel against a trusted reference, operator by operator."""
