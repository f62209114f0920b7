"""Callbacks: phases and freezing, the guard that proves them, and what a run prints and records."""
