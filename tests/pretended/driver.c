// The CUDA runtime (rt_) and driver (dr_) as CuPy's Cython calls them, for a card that does not
// exist.
//
// The functions' C signatures are those of cupy_backends.cuda.api.runtime and .driver 14.2. The
// last int says that no Python override is looked for. Memory is the host's; new memory is filled
// with 0xFF. Work that is queued is done at once. A launch that a card would refuse is refused.
#include <Python.h>
#include <stdlib.h>
#include <string.h>

typedef intptr_t address;
typedef unsigned int uint;
#define DONE Py_RETURN_NONE

enum { THREADS = 1024, SHARED = 232448, PROCESSORS = 132 };  // an H100's

static address last = 1000;
static PyObject *on_function, *on_launch, *properties;

void set_callbacks(PyObject *function, PyObject *launch, PyObject *facts) {
    Py_INCREF(function), Py_INCREF(launch), Py_INCREF(facts);
    on_function = function, on_launch = launch, properties = facts;
}

// the card

int rt_getDevice(int s) { return 0; }
int rt_getDeviceCount(int s) { return 1; }
PyObject *rt_setDevice(int device, int s) { DONE; }
int rt_driverGetVersion(int s) { return 13000; }
int rt_runtimeGetVersion(int s) { return 13000; }
int rt__getCUDAMajorVersion(int s) { return 13; }
PyObject *rt__ensure_context(void) { DONE; }
PyObject *rt_getDeviceProperties(int device, int s) { Py_INCREF(properties); return properties; }

int rt_deviceGetAttribute(int which, int device, int s) {
    switch (which) {  // cudaDeviceAttr
        case 1: return THREADS;
        case 5: return 2147483647;  // the largest grid
        case 6: case 7: return 65535;
        case 8: return 48 << 10;  // shared memory without asking
        case 10: return 32;  // a warp
        case 12: return 65536;  // registers
        case 16: return PROCESSORS;
        case 38: return 50 << 20;  // L2 cache
        case 39: return 2048;  // threads of a multiprocessor
        case 75: return 9;  // compute capability
        case 76: return 0;
        case 97: return SHARED;
    }
    return 1;
}

// memory

address rt_malloc(size_t size, int s) {
    void *memory = NULL;
    if (posix_memalign(&memory, 512, size ? size : 512)) {
        PyErr_NoMemory();
        return 0;
    }
    memset(memory, 0xFF, size);
    return (address)memory;
}
PyObject *rt_free(address p, int s) { free((void *)p); DONE; }
address rt_mallocAsync(size_t size, address stream, int s) { return rt_malloc(size, s); }
PyObject *rt_freeAsync(address p, address stream, int s) { return rt_free(p, s); }
address rt_hostAlloc(size_t size, uint flags, int s) { return rt_malloc(size, s); }
PyObject *rt_freeHost(address p, int s) { return rt_free(p, s); }
PyObject *rt_memcpy(address to, address from, size_t n, int kind, int s) {
    memmove((void *)to, (void *)from, n);
    DONE;
}
PyObject *rt_memcpyAsync(address to, address from, size_t n, int kind, address stream, int s) {
    return rt_memcpy(to, from, n, kind, s);
}
PyObject *rt_memset(address p, int value, size_t n, int s) {
    memset((void *)p, value, n);
    DONE;
}
PyObject *rt_memsetAsync(address p, int value, size_t n, address stream, int s) {
    return rt_memset(p, value, n, s);
}
PyObject *rt_memGetInfo(int s) {
    return Py_BuildValue("(LL)", 80LL << 30, 80LL << 30);
}
int rt_pointerGetMemoryType(address p, int s) { return 0; }

// streams and events

address rt_streamCreate(int s) { return ++last; }
address rt_streamCreateWithFlags(uint flags, int s) { return ++last; }
address rt_streamCreateWithPriority(uint flags, int priority, int s) { return ++last; }
PyObject *rt_streamDestroy(address stream, int s) { DONE; }
PyObject *rt_streamQuery(address stream, int s) { return PyLong_FromLong(0); }
PyObject *rt_streamSynchronize(address stream, int s) { DONE; }
PyObject *rt_streamWaitEvent(address stream, address event, int s, void *optional) { DONE; }
int rt_streamIsCapturing(address stream, int s) { return 0; }
uint rt_streamGetFlags(address stream, int s) { return 1; }
int rt_streamGetPriority(address stream, int s) { return 0; }
address rt_eventCreate(int s) { return ++last; }
address rt_eventCreateWithFlags(uint flags, int s) { return ++last; }
PyObject *rt_eventDestroy(address event, int s) { DONE; }
PyObject *rt_eventQuery(address event, int s) { return PyLong_FromLong(0); }
PyObject *rt_eventSynchronize(address event, int s) { DONE; }
PyObject *rt_eventRecord(address event, address stream, int s) { DONE; }
float rt_eventElapsedTime(address from, address to, int s) { return 1.0f; }
PyObject *rt_deviceSynchronize(int s) { DONE; }

// modules and launches

address dr_ctxGetCurrent(int s) { return 1; }
int dr_ctxGetDevice(int s) { return 0; }
address dr_moduleLoadData(PyObject *image, int s) {
    char *bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(image, &bytes, &size)) return 0;
    if (size < 4 || memcmp(bytes, "\177ELF", 4)) {
        PyErr_SetString(PyExc_RuntimeError, "what is loaded was not compiled for a card");
        return 0;
    }
    return ++last;
}
PyObject *dr_moduleUnload(address module, int s) { DONE; }
address dr_moduleGetFunction(address module, PyObject *name, int s) {
    PyObject *number = PyObject_CallFunction(on_function, "nO", (Py_ssize_t)module, name);
    if (!number) return 0;
    address function = PyLong_AsSsize_t(number);
    Py_DECREF(number);
    return function;
}
PyObject *dr_launchKernel(address f, uint gx, uint gy, uint gz, uint bx, uint by, uint bz,
                          uint shared, address stream, address arguments, address extra, int s) {
    if (!gx || !gy || !gz || !bx || !by || !bz || gx > 2147483647u || gy > 65535 || gz > 65535 ||
        (unsigned long)bx * by * bz > THREADS || shared > SHARED)
        return PyErr_Format(PyExc_RuntimeError, "no launch of a grid of %u x %u x %u, blocks of "
                            "%u x %u x %u, %u bytes shared", gx, gy, gz, bx, by, bz, shared);
    return PyObject_CallFunction(on_launch, "n(IIIIII)In", (Py_ssize_t)f, gx, gy, gz, bx, by, bz,
                                 shared, (Py_ssize_t)arguments);
}
int dr_funcGetAttribute(int which, address f, int s) {
    return which == 0 ? THREADS : which == 4 ? 32 : 0;  // threads of a block, registers
}
PyObject *dr_funcSetAttribute(address f, int which, int value, int s) { DONE; }
int dr_occupancyMaxActiveBlocksPerMultiprocessor(address f, int block, size_t shared, int s) {
    return 8;
}
PyObject *dr_occupancyMaxPotentialBlockSize(address f, size_t shared, int limit, int s) {
    return Py_BuildValue("(ii)", PROCESSORS, 256);
}
