"""Files of Keras and TensorFlow: read as those systems wrote them, and as untrusted data.

`data/files` holds one model after five steps, saved by tf.keras with an optimizer of before 2.11
("legacy") and with a later one, and by Keras 3: `<kind>.h5` by ``model.save``; in `<kind>.npz` what
``tf.train.load_checkpoint`` reads in an object checkpoint, under "checkpoint/", and what the
optimizer held.
"""

import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal

import adam_transforms as at
from adam_transforms.interop import keras, tf1, tf2

h5py: Any = pytest.importorskip("h5py")

FILES = Path(__file__).parent / "data" / "files"
NAMES = ["hidden/kernel", "hidden/bias", "out/kernel", "out/bias"]
RECORDED = {
    "hidden": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)},
    "out": {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)},
}


def recorded(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the checkpoint, what the optimizer held)."""
    with np.load(FILES / f"{kind}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    keys = [key for key in arrays if key.startswith("checkpoint/")]
    return {key.removeprefix("checkpoint/"): arrays.pop(key) for key in keys}, arrays


def assert_state_is(state: Any, held: dict[str, Any]) -> None:
    assert int(optax.tree.get(state, "count")) == held["count"] == 5
    for slot in ("mu", "nu", "nu_max"):
        found = {
            at.path_str(p): x
            for p, x in jax.tree_util.tree_flatten_with_path(optax.tree.get(state, slot))[0]
        }
        assert_bits_equal(found, {name: held[f"{slot}/{name}"] for name in NAMES})


@pytest.mark.parametrize("kind", ["legacy", "later", "keras3"])
def test_a_model_saved_as_hdf5_is_read(kind):
    _, held = recorded(kind)
    state = keras.state_from(FILES / f"{kind}.h5", RECORDED, at.adam(amsgrad=True), NAMES)
    assert_state_is(state, held)


@pytest.mark.parametrize("kind", ["legacy", "later", "keras3"])
def test_an_object_checkpoint_is_read(kind):
    def rename(path):
        if not kind.startswith("legacy"):
            return path
        for i, layer in enumerate(("hidden", "out")):
            path = path.replace(layer, f"model/layer_with_weights-{i}")
        return path

    checkpoint, held = recorded(kind)
    tx = at.adam(amsgrad=True)
    assert_state_is(tf2.state_from(checkpoint, RECORDED, tx, NAMES, rename=rename), held)

    checkpoint, held = recorded(f"{kind}_scaled")
    tx = at.adam(amsgrad=True, loss_scale="dynamic")
    state = tf2.state_from(checkpoint, RECORDED, tx, NAMES, rename=rename)
    assert_state_is(state, held)
    assert float(optax.tree.get(state, "scale")) == held["scale"]
    with pytest.raises(ValueError, match="'optimizer' has a dynamic loss scale, but the state of"):
        tf2.state_from(checkpoint, RECORDED, at.adam(amsgrad=True), NAMES, rename=rename)


# A small model of our own, to be damaged


PARAMS = {"k": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
STORE = {
    "0": np.array(7, np.int64),
    "1": np.array(0.1, np.float32),
    **{key: np.full((2, 3), int(key), np.float32) for key in "23"},
    **{key: np.full(3, int(key), np.float32) for key in "45"},
}


def read(path: Any, **options: Any) -> Any:
    return keras.state_from(path, PARAMS, at.adam(), ["k", "b"], **options)


def write(path: Path, put: Callable[[Any], Any] | None = None) -> Path:
    """A weights file; `put` writes the first momentum, named "2"."""
    with h5py.File(path, "w") as file:
        group = file.create_group("optimizer/vars")
        for key, array in STORE.items():
            if key != "2" or put is None:
                group[key] = array
        if put is not None:
            put(group)
    return path


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.weights.h5"


def test_nothing_outside_of_the_file_is_read(path):
    other = path.parent / "other.h5"
    with h5py.File(other, "w") as file:
        file["x"] = STORE["2"]
        file["optimizer/vars"] = h5py.ExternalLink(write(path.parent / "whole.h5"), "/optimizer")
    layout = h5py.VirtualLayout((2, 3), "f4")
    layout[:] = h5py.VirtualSource(other, "x", (2, 3))
    raw = [(str(other), 0, 24)]
    cases: list[tuple[Callable[[Any], Any], str]] = [
        (lambda g: g.__setitem__("2", h5py.ExternalLink(other, "/x")), "soft or external link"),
        (lambda g: g.__setitem__("2", h5py.SoftLink("/to/other")), "soft or external link"),
        (lambda g: g.create_dataset("2", (2, 3), "f4", external=raw), "data in another file"),
        (lambda g: g.create_virtual_dataset("2", layout), "is a virtual dataset"),
    ]
    for put, message in cases:
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
            read(write(path, put))
        with h5py.File(path, "r") as file:  # opened by the caller
            with pytest.raises(ValueError, match=message):
                read(file["optimizer/vars"])
    with pytest.raises(ValueError, match="soft or external link"):
        read(other)


def test_shapes_are_compared_before_data_are_read(path):
    huge = (2**20, 2**14)
    for options in ({}, {"chunks": (1024, 1024), "compression": "gzip"}):
        write(path, lambda g, options=options: g.create_dataset("2", huge, "f4", **options))
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"momentum of 'k'.* has shape \[1048576, 16384\]"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
        tracemalloc.stop()

    class Huge:
        shape = huge

        def __array__(self, dtype=None, copy=None):
            raise AssertionError("was read")

    arrays = {"k/Adam": Huge(), "beta1_power": np.float32(0.9), "beta2_power": np.float32(0.999)}
    with pytest.raises(ValueError, match=r"has shape \[1048576, 16384\]"):
        tf1.state_from(arrays, PARAMS, at.adam())
    with pytest.raises(ValueError, match="iteration must be a scalar"):
        read(STORE | {"0": Huge()})


def test_only_numbers_are_read(path):
    for dtype in (object, h5py.vlen_dtype("f4"), h5py.ref_dtype, [("a", "f4")], "V2"):
        dtype = h5py.string_dtype() if dtype is object else dtype
        with pytest.raises(ValueError, match="vars/2 must be an array of numbers, got"):
            read(write(path, lambda g, dtype=dtype: g.create_dataset("2", (2, 3), dtype)))
    with pytest.raises(ValueError, match=r"has shape \[\], expected \[2, 3\]"):
        read(write(path, lambda g: g.create_dataset("2", data=h5py.Empty("f4"))))


def test_compressed_data_are_read_unless_they_unpack_to_far_more(path):
    def put(g: Any, **options: Any) -> None:
        g.create_dataset("2", data=STORE["2"], **options)

    ordinary = {"compression": "gzip", "shuffle": True, "fletcher32": True}
    assert_bits_equal(read(write(path, lambda g: put(g, **ordinary))), read(STORE))
    wide = {"chunks": (2**12, 2**11), "maxshape": (None, None), "compression": "gzip"}
    with pytest.raises(ValueError, match="has 6 elements in chunks"):
        read(write(path, lambda g: put(g, **wide)))

    def put_twice(g: Any) -> None:
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((2, 3))
        settings.set_deflate(9)
        settings.set_filter(h5py.h5z.FILTER_LZF, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((2, 3))
        h5py.h5d.create(g.id, b"2", h5py.h5t.NATIVE_FLOAT, space, settings)

    with pytest.raises(ValueError, match="is compressed more than once"):
        read(write(path, put_twice))


def test_second_moments_are_finite_and_not_negative():
    for value in (-1.0, np.nan, np.inf, -np.inf):
        nu = np.array([1.0, value, 1.0], np.float32)
        with pytest.raises(ValueError, match="velocity of 'b', for 'b', has values that are neg"):
            read(STORE | {"5": nu})
    layout = keras.Layout(amsgrad=True, learning_rate=False)
    store = {
        str(i): np.full(3, -1.0 if slot == "nu_max" else 1.0, np.float32)
        if at is not None
        else np.int64(3)
        for i, (slot, at) in enumerate(keras.entries(layout, 1))
    }
    with pytest.raises(ValueError, match="velocity_hat of '0'.* negative or not finite"):
        keras.state_from(store, [jnp.zeros(3)], at.adam(amsgrad=True))
    with pytest.raises(ValueError, match="iteration must be an integer in"):
        read(STORE | {"0": np.int64(-1)})


def test_a_loss_scale_is_positive_and_finite():
    tx = at.adam(loss_scale="dynamic")
    for scale in (0.0, -2.0, np.nan, np.inf):
        outer = [np.int64(0), np.float32(0.0), np.int64(0), np.float32(scale)]
        with pytest.raises(ValueError, match="dynamic_scale must be positive and finite"):
            keras.state_from([*outer, *STORE.values()], PARAMS, tx, ["k", "b"])


def test_a_damaged_file_is_one_error_with_its_name(path):
    whole = write(path).read_bytes()
    model = path.parent / "model.keras"

    def archive(member: str, data: bytes, packing: int = zipfile.ZIP_STORED) -> bytes:
        with zipfile.ZipFile(model, "w", packing) as file:
            file.writestr("config.json", "{}")
            file.writestr(member, data)
        return model.read_bytes()

    archive("model.weights.h5", whole)
    assert_bits_equal(read(model), read(STORE))
    good = archive("model.weights.h5", whole, zipfile.ZIP_DEFLATED)
    assert_bits_equal(read(model), read(STORE))
    directory = good.rindex(b"PK\x01\x02")  # the entry of the last member
    declared = bytearray(good)
    declared[directory + 24 : directory + 28] = b"\xf0\xff\xff\xff"
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 255
    cases = [
        (b"", "damaged or of another format"),
        (b"\x89HDF\r\n\x1a\n" + bytes(range(256)), "damaged or of another format"),
        (whole[: len(whole) // 2], "damaged or of another format"),
        (good[: len(good) // 2], "damaged or of another format"),
        (bytes(flipped), "damaged or of another format"),
        (archive("model.weights.h5", b"x" * 100), "damaged or of another format"),
        (archive("weights.h5", whole), "the archive has no model.weights.h5"),
        (bytes(declared), "would unpack to 4294967280 bytes"),
        (archive("model.weights.h5", bytes(1 << 26), zipfile.ZIP_DEFLATED), "would unpack to"),
    ]
    for data, message in cases:
        model.write_bytes(data)
        with pytest.raises(ValueError, match=f"^{re.escape(str(model))}: .*{message}"):
            read(model)
    with pytest.raises(FileNotFoundError):
        read(path.parent / "absent.keras")


def test_groups_with_unusual_names_are_refused_by_name(path):
    for name in ("momentum", "02", "ä", b"\xff\xfe"):
        with pytest.raises(ValueError, match=r"/optimizer/vars must have datasets \['2'\], got"):
            read(write(path, lambda g, name=name: g.__setitem__(name, STORE["2"])))
    with pytest.raises(ValueError, match=r"must have datasets \['2'\]"):
        read(write(path, lambda g: g.create_group("2")))


# Keras 2's model.save("model.h5")

LEGACY = {
    "Adam/iter:0": STORE["0"],
    "Adam/k/m:0": STORE["2"],
    "Adam/b/m:0": STORE["4"],
    "Adam/k/v:0": STORE["3"],
    "Adam/b/v:0": STORE["5"],
}


def write_model(path: Path, weights: dict[str, Any], names: Any = None) -> Path:
    with h5py.File(path, "w") as file:
        file.create_group("model_weights")
        group = file.create_group("optimizer_weights")
        group.attrs["weight_names"] = [n.encode() for n in weights] if names is None else names
        for name, array in weights.items():
            group[name] = array
    return path


def test_the_names_in_a_model_file_tell_its_order(path):
    expected = read(STORE)
    assert_bits_equal(read(write_model(path, LEGACY)), expected)
    assert_bits_equal(read(path, legacy=True), expected)
    later = {"iteration:0": STORE["0"]}
    later |= {f"Adam/{m}/{p}:0": LEGACY[f"Adam/{p}/{m}:0"] for p in "kb" for m in "mv"}
    assert_bits_equal(read(write_model(path, later)), expected)
    keras2 = dict(
        zip(
            ["Adam/iterations:0", *(f"training/Adam/Variable_{i}:0" for i in range(4))],
            LEGACY.values(),
            strict=True,
        )
    )
    keras2 |= {f"training/Adam/Variable_{i}:0": np.zeros(1) for i in (4, 5)}  # no AMSGrad
    assert_bits_equal(read(write_model(path, keras2)), expected)


def test_names_longer_than_an_attribute_are_split(path):
    write_model(path, LEGACY)
    with h5py.File(path, "r+") as file:
        attributes = file["optimizer_weights"].attrs
        names = attributes.pop("weight_names")
        attributes["weight_names0"], attributes["weight_names1"] = names[:2], names[2:]
    assert_bits_equal(read(path), read(STORE))


@pytest.mark.parametrize(
    ("weights", "names", "message"),
    [
        ({k: x for k, x in LEGACY.items() if k != "Adam/b/v:0"}, [*LEGACY], "must have datasets"),
        (LEGACY, ["Adam/iter:0", *["/model_weights"] * 4], "must have datasets"),
        (LEGACY, [*LEGACY][1:], "must begin with the number of steps"),
        (LEGACY, np.arange(5), "weight_names of /optimizer_weights must be strings"),
    ],
)
def test_names_that_lead_nowhere_are_refused(path, weights, names, message):
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
        read(write_model(path, weights, names))


def test_it_says_saved_without_its_optimizer_only_where_that_is_so(path):
    def message(make: Callable[[Any], Any]) -> str:
        with h5py.File(path, "w") as file:
            make(file)
        with pytest.raises(ValueError) as error:
            read(path)
        return str(error.value)

    def weights_only(file: Any) -> None:
        file.create_group("dense")
        file.attrs["layer_names"] = [b"dense"]

    without = "the model was saved without its optimizer, or before the first step"
    assert without in message(lambda file: file.create_group("model_weights"))
    assert without in message(lambda file: file.create_group("layers"))
    others = {
        "save_weights wrote it": weights_only,
        "Keras writes no such file": lambda file: file.create_group("other"),
        "must have datasets ['0'], got ['x']": lambda file: file.create_group("optimizer/vars/x"),
        "it is not Adam, or": lambda file: file.create_dataset("optimizer/vars/0", data=3),
    }
    for expected, make in others.items():
        found = message(make)
        assert expected in found and without not in found


# TensorFlow 2's object checkpoints


def checkpoint(**values: Any) -> dict[str, Any]:
    keys = {"optimizer/iter": STORE["0"], "save_counter": np.int64(1), "model/k": STORE["2"]}
    for name, m, v in (("k", "2", "3"), ("b", "4", "5")):
        keys[f"model/{name}/.OPTIMIZER_SLOT/optimizer/m"] = STORE[m]
        keys[f"model/{name}/.OPTIMIZER_SLOT/optimizer/v"] = STORE[v]
    keys |= values
    found = {f"{key}/.ATTRIBUTES/VARIABLE_VALUE": x for key, x in keys.items() if x is not None}
    return found | {"_CHECKPOINTABLE_OBJECT_GRAPH": b"\x0a\x00"}


def numbered(**values: Any) -> dict[str, Any]:
    keys = {"optimizer/_iterations": STORE["0"], "optimizer/_learning_rate": STORE["1"]}
    keys |= {f"optimizer/_variables/{i}": STORE[str(i)] for i in range(2, 6)}
    keys |= values
    return {f"{key}/.ATTRIBUTES/VARIABLE_VALUE": x for key, x in keys.items() if x is not None}


def read_checkpoint(arrays: Any, **options: Any) -> Any:
    return tf2.state_from(arrays, PARAMS, at.adam(), rename=lambda p: f"model/{p}", **options)


def test_the_optimizer_of_a_checkpoint_may_have_any_path():
    expected = read(STORE)
    assert_bits_equal(read_checkpoint(checkpoint()), expected)
    arrays = {key.replace("optimizer", "train/opt"): x for key, x in checkpoint().items()}
    assert_bits_equal(read_checkpoint(arrays, optimizer="train/opt"), expected)
    with pytest.raises(ValueError, match=r"no optimizer 'optimizer', pass .* \['train/opt'\]"):
        read_checkpoint(arrays)
    arrays = {key.replace("optimizer", "opt"): x for key, x in numbered().items()}
    names = ["model/k", "model/b"]
    assert_bits_equal(read_checkpoint(arrays, names=names, optimizer="opt"), expected)
    with pytest.raises(ValueError, match=r"no optimizer 'optimizer', pass .* \['opt'\]"):
        read_checkpoint(arrays)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: checkpoint(**{"model/k/.OPTIMIZER_SLOT/optimizer/rms": STORE["2"]}),
            "'optimizer' is not Adam: it has a slot 'rms'",
        ),
        (lambda: checkpoint(**{"optimizer/iter": None}), "but no optimizer/iter"),
        (lambda: numbered(**{"optimizer/_variables/3": None}), "must have every N below 5"),
        (
            lambda: checkpoint(
                **{"model/k/.OPTIMIZER_SLOT/optimizer/v": -STORE["3"], "optimizer/iter": STORE["0"]}
            ),
            "OPTIMIZER_SLOT/optimizer/v', for 'k', has values that are negative",
        ),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        read_checkpoint(make())


def test_what_is_no_checkpoint_of_this_kind_is_refused():
    with pytest.raises(TypeError, match="arrays must map keys to arrays"):
        read_checkpoint("model.ckpt")
    with pytest.raises(ValueError, match="checkpoints of TensorFlow 1 are read by interop.tf1"):
        read_checkpoint({"k/Adam": np.ones(3)})
    with pytest.raises(ValueError, match="object checkpoint of TensorFlow 2: use interop.tf2"):
        tf1.state_from(checkpoint(), PARAMS, at.adam())
    model = {"model/k/.ATTRIBUTES/VARIABLE_VALUE": STORE["2"]}
    with pytest.raises(ValueError, match="the checkpoint was saved without an optimizer"):
        read_checkpoint(model)
    with pytest.raises(ValueError, match="has no slots: it is not Adam, or was saved before"):
        read_checkpoint(model | {"optimizer/iter/.ATTRIBUTES/VARIABLE_VALUE": np.int64(0)})
