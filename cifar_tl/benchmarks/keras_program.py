"""The original study in Keras, run by peers.py in an environment that has TensorFlow and nothing of cifar_tl.

python keras_program.py THREADS WARM_UP STEPS reads the name of a phase from each line of stdin, trains WARM_UP + STEPS
batches of it on random images, and answers with a line of JSON: {"images_per_s": of the last STEPS}.
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np
import tensorflow as tf

BATCH_SIZE = 64


def build(trainable: bool, learning_rate: float) -> Any:
    """Return the compiled model; a backbone that is not trainable has its BatchNorm in inference mode."""
    base = tf.keras.applications.ResNet50(include_top=False, weights=None, input_shape=(32, 32, 3))
    base.trainable = trainable
    layers = tf.keras.layers
    model = tf.keras.Sequential(
        [
            base,
            layers.GlobalAveragePooling2D(),
            layers.Dense(128, activation="relu"),
            layers.Dense(64, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )
    adam = tf.keras.optimizers.Adam(learning_rate)
    model.compile(optimizer=adam, loss="categorical_crossentropy", metrics=["accuracy"])
    return model


def main(threads: int, warm_up: int, steps: int) -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    rng = np.random.default_rng(0)
    size = (warm_up + steps) * BATCH_SIZE
    images = rng.integers(0, 256, (size, 32, 32, 3)).astype("float32")
    images = tf.keras.applications.resnet50.preprocess_input(images)
    labels = np.eye(10, dtype="float32")[rng.integers(0, 10, size)]
    # a model for each phase, so that turns can alternate without compiling again
    models = {"frozen": build(False, 1e-3), "fine-tune": build(True, 1e-5)}
    for line in sys.stdin:
        ends: list[float] = []
        clock = tf.keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs, ends=ends: ends.append(time.perf_counter())
        )
        models[line.strip()].fit(images, labels, batch_size=BATCH_SIZE, epochs=1, verbose=0, callbacks=[clock])
        speed = steps * BATCH_SIZE / (ends[-1] - ends[warm_up - 1])
        print(json.dumps({"images_per_s": speed}), file=answers, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
