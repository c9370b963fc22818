"""Objectives that remember: momentum encoders with queues, and numbers kept for each training sample."""
