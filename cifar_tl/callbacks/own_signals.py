"""Signals stay with whoever handled them before the Trainer came."""

import signal
import threading

import lightning as L


class OwnSignals(L.Callback):
    """Put the process's handler of SIGTERM back, in front of which Lightning puts its own.

    With several processes, Lightning's broadcasts from inside of the handler, while the others may be in another
    collective operation: both would wait until the cluster kills them. It is made before the Trainer starts.
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the handler back; Lightning's is set just before."""
        if callable(self._handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)

    on_test_start = on_train_start
