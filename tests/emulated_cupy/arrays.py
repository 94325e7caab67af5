"""The stand-in's arrays: NumPy arrays inside, but they can do only what CuPy's arrays can.

Every operation goes through `run`. It accepts the stand-in's own arrays and scalars but no NumPy
array, calls NumPy, and wraps the result. If the result is not a view of an input, it counts as a
launch.
"""

import functools
from collections import Counter
from types import SimpleNamespace

import numpy as np

from emulated_cupy import memory, real, streams

TINY = np.finfo(np.float32).tiny
launches = Counter()  # by name: what would start a kernel or a copy on the card
traffic = Counter()  # by name: bytes of the arrays that went in and came out
to_host, to_device = Counter(), Counter()  # by name: copies between the card and NumPy


def reset():
    """Set all counters to zero."""
    for counter in (launches, traffic, to_host, to_device):
        counter.clear()


def count(name, arrays):
    launches[name] += 1
    traffic[name] += sum(a.nbytes for a in arrays)


class ndarray:
    """cupy.ndarray. Attributes that are not here are NumPy's, if the real class has them."""

    __slots__ = ("__weakref__", "_host")
    __array_ufunc__ = None  # NumPy's functions do not take it
    __hash__ = None

    def __init__(self, shape, dtype=float):
        self._host = memory.unwritten(np.empty(shape, dtype))
        memory.adopt(self._host)

    dtype = property(lambda self: self._host.dtype)
    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    flags = property(lambda self: self._host.flags)
    T = property(lambda self: _over(self._host.T))
    mT = property(lambda self: _over(self._host.mT))
    data = property(lambda self: SimpleNamespace(ptr=self._host.ctypes.data))
    device = property(lambda self: DEVICE)

    def __getattr__(self, name):
        real.require("ndarray", name)
        method = None if name.startswith("_") else getattr(np.ndarray, name, None)
        if not callable(method):
            raise AttributeError(f"the stand-in for cupy.ndarray has no {name!r}")

        def call(*args, **kwargs):
            real.bind(f"ndarray.{name}", (self, *args), kwargs)
            return run(name, method, (self, *args), kwargs)
        return call

    def __array__(self, dtype=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. "
                        "Please use `.get()` to construct a NumPy array explicitly.")

    def get(self, stream=None, order="C", out=None, blocking=True):
        if out is None:
            return _to_host(self, "get").copy(order)
        if out.dtype != self.dtype or out.shape != self.shape:
            raise TypeError(f"{self.dtype} {self.shape} does not fit {out.dtype} {out.shape}")
        if not blocking:
            streams.copied(stream, "get", out)
        out[...] = _to_host(self, "get")
        return out

    def set(self, arr, stream=None):
        if not isinstance(arr, np.ndarray) or arr.dtype != self.dtype:
            raise TypeError(f"set needs a NumPy array of {self.dtype}")
        if arr.shape != self.shape:
            raise ValueError(f"set needs shape {self.shape}, got {arr.shape}")
        if stream is not None:
            streams.copied(stream, "set", arr)
        self._host[...] = arr
        _to_device(self, "set")

    def tolist(self): return _to_host(self, "tolist").tolist()
    def item(self): return _to_host(self, "item").item()
    def __bool__(self): return bool(_to_host(self, "bool"))
    def __int__(self): return int(_to_host(self, "int"))
    def __float__(self): return float(_to_host(self, "float"))
    def __repr__(self): return repr(_to_host(self, "repr"))
    def __str__(self): return str(_to_host(self, "str"))
    def __format__(self, spec): return format(_to_host(self, "format")[()], spec)
    def __copy__(self): return self.copy()
    def __deepcopy__(self, memo): return self.copy()
    def __len__(self): return len(self._host)
    def __iter__(self): return (self[i] for i in range(len(self)))
    def __neg__(self): return elementwise("negative", self)
    def __pos__(self): return elementwise("positive", self)
    def __abs__(self): return elementwise("absolute", self)
    def __invert__(self): return elementwise("invert", self)

    def __getitem__(self, index):
        given = [self]
        return _outside("getitem", self._host[_index(index, given)], given)

    def __setitem__(self, index, value):
        if not is_operand(value):
            raise TypeError(f"an item of a CuPy array cannot be set to a {type(value).__name__}")
        given = [self]
        index = _index(index, given)
        if isinstance(value, ndarray):
            given.append(value)
            value, place = value._host, self._host[index]
            if (place.ctypes.data, place.shape, place.strides) == (
                    value.ctypes.data, value.shape, value.strides):
                return  # x[i] += 1 has written there already
        self._host[index] = value
        count("setitem", given)


DEVICE = SimpleNamespace(id=0)


def is_operand(x):
    return isinstance(x, (ndarray, bool, int, float, complex, np.generic))


def run(name, fn, args, kwargs):
    """NumPy's fn on the arrays inside args. Its result comes as arrays of ours."""
    given = []
    args = _inside(name, args, given)
    kwargs = {key: _inside(name, value, given) for key, value in kwargs.items()}
    return _outside(name, fn(*args, **kwargs), given, kwargs.get("out") is not None)


def elementwise(name, *args, **kwargs):
    """A ufunc. It always writes a result, to a new C-contiguous array if none is given.

    CuPy compiles these with -ftz=true: float32 numbers below 1.2e-38 become 0, inputs and results.
    """
    if wrong := kwargs.keys() - {"out", "dtype", "casting"}:
        raise TypeError(f"Wrong arguments {wrong} for cupy.{name}")
    given = []
    args = _inside(name, args, given)
    kwargs = {key: _inside(name, value, given) for key, value in kwargs.items()}
    result = getattr(np, name)(*map(_flushed, args), order="C", **kwargs)
    return _outside(name, _flushed(result, kwargs.get("out")), given, True)


def _flushed(x, into=None):
    """x with 0 for what is too small for a normal float32; written to `into` if given."""
    small = getattr(x, "dtype", None) == np.float32 and (np.abs(x) < TINY) & (x != 0)
    if not np.any(small):
        return x
    x = np.where(small, np.copysign(np.float32(0), x), x)
    if into is None:
        return x
    into[...] = x
    return into


def matmul(a, b, out=None):
    """a @ b as CuPy calls cuBLAS: sums in at least float32, and strided arrays are copied."""
    if not (isinstance(a, ndarray) and isinstance(b, ndarray)):
        raise TypeError(f"matmul takes arrays of CuPy, got {type(a).__name__}, {type(b).__name__}")
    if a.ndim == b.ndim == 1 and out is None:
        return (a * b).sum()  # CuPy 14.2 does this, with the whole product in memory
    dtype, stacked = np.promote_types(a.dtype, b.dtype), max(a.ndim, b.ndim) > 2
    if stacked and dtype.name == "bfloat16":
        raise TypeError("data type 'E' not understood")  # CuPy 14.2 says this
    for x in (a, b):
        ready = x.flags.c_contiguous if stacked else x.itemsize in x.strides  # one axis is dense
        if x.dtype != dtype or not ready:
            count("copy", [x, x])
    half = dtype.itemsize == 2 and dtype.kind in "fV"
    inner = np.dtype(np.float32) if half else dtype
    y = np.matmul(a._host.astype(inner, copy=False), b._host.astype(inner, copy=False))
    y = np.asarray(y).astype(dtype, copy=False)
    if out is None:
        return _outside("matmul", y, [a, b])
    out._host[...] = y
    count("matmul", [a, b, out])
    return out


def at(name, array, indices, b=None):
    """cupy.<ufunc>.at: add (or other) at an index that may name an element twice."""
    if name not in AT:
        raise NotImplementedError(f"`cupy_{name}.at` is not supported yet")
    if array.dtype.name not in AT[name].split():
        raise TypeError(f"cupy.{name}.at only supports {AT[name]} as data type")
    given = [array]
    index = _index(indices, given)
    getattr(np, name).at(array._host, index, _inside(name, b, given))
    count(f"{name}.at", given)


AT = {"add": "int32 int64 float16 float32 float64 uint32 uint64", "subtract": "int32 uint32",
      "maximum": "int32 int64 float32 float64 uint32 uint64",
      "minimum": "int32 int64 float32 float64 uint32 uint64"}


def array(obj, dtype=None, copy=True):
    """NumPy's arrays and lists, copied to the card; our arrays, converted."""
    if isinstance(obj, ndarray):
        changed = dtype is not None and np.dtype(dtype) != obj.dtype
        return obj.astype(dtype) if changed else obj.copy() if copy else obj
    made = new(np.array(obj, dtype))
    _to_device(made, "asarray")
    return made


def new(host: np.ndarray) -> ndarray:
    """An array of ours around memory that nobody else has."""
    memory.adopt(host)
    return _over(host)


def _over(host: np.ndarray) -> ndarray:
    """An array of ours around memory that the pool knows already."""
    x = ndarray.__new__(ndarray)
    x._host = host
    return x


def _index(index, given):
    """The index for NumPy, changed so that one element gives a view and not a scalar."""
    index = _inside("an index", index, given)
    key = index if isinstance(index, tuple) else (index,)
    return key if any(k is Ellipsis for k in key) else (*key, Ellipsis)


def _inside(name, x, given):
    """x with NumPy arrays in place of ours, which are added to the list `given`."""
    if isinstance(x, ndarray):
        given.append(x)
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError(f"{name}: a NumPy array among CuPy's, {x.dtype} {x.shape}")
    if type(x) in (list, tuple):
        return type(x)(_inside(name, part, given) for part in x)
    return x


def _outside(name, result, given, writes=False):
    """NumPy's result as arrays of ours. It was a launch if one is new or an output was given."""
    fresh = []
    wrapped = _wrapped(result, given, fresh)
    if fresh or writes or result is None:
        count(name, given + fresh)
    return wrapped


def _wrapped(x, given, fresh):
    if isinstance(x, (list, tuple)):
        return type(x)(_wrapped(part, given, fresh) for part in x)
    if isinstance(x, (bool, np.generic)):
        x = np.array(x)
    if not isinstance(x, np.ndarray):
        return x
    for a in given:
        if a._host is x:
            return a
    if any(memory.owner(a._host) is memory.owner(x) for a in given):
        return _over(x)
    fresh.append(new(x if x.flags.forc else x.copy()))
    return fresh[-1]


def _to_host(x, name):
    to_host[name] += 1
    return x._host


def _to_device(x, name):
    to_device[name] += 1


def _add_operator(name, ufunc):
    call = matmul if ufunc == "matmul" else functools.partial(elementwise, ufunc)

    def checked(x):
        if isinstance(x, np.ndarray):
            raise TypeError(f"{ufunc}: a NumPy array and a CuPy array, {x.dtype} {x.shape}")
        return is_operand(x)

    def forward(self, other): return call(self, other) if checked(other) else NotImplemented
    def backward(self, other): return call(other, self) if checked(other) else NotImplemented
    def in_place(self, other):
        return call(self, other, out=self) if checked(other) else NotImplemented

    setattr(ndarray, f"__{name}__", forward)
    if name not in ("lt", "le", "eq", "ne", "gt", "ge"):
        setattr(ndarray, f"__r{name}__", backward)
        if name != "matmul":
            setattr(ndarray, f"__i{name}__", in_place)


for _name, _ufunc in {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide",
    "floordiv": "floor_divide", "mod": "remainder", "pow": "power", "lshift": "left_shift",
    "rshift": "right_shift", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "lt": "less", "le": "less_equal", "eq": "equal", "ne": "not_equal", "gt": "greater",
    "ge": "greater_equal", "matmul": "matmul",
}.items():
    _add_operator(_name, _ufunc)
