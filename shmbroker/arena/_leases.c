/* Leases, compiled: what shmbroker/arena/python_leases.py says, for half of its cost.
 *
 * A tensor is made from a DLPack capsule whose deleter, called when the last tensor over the block has died, puts the block on a list. torch may
 * call it in any thread, with or without the interpreter lock: so it takes no lock (A2) and touches no Python object; the arena collects the list.
 * When the arena is gone, nobody collects any more: then the deleter takes the interpreter lock and cleans up itself.
 */

#define _GNU_SOURCE
#include "../memory/_arguments.h"

#include <errno.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include <shmbroker/layout.h>

/* DLPack 0.x, which every torch can read; see https://dmlc.github.io/dlpack/latest/c_api.html */
typedef struct {
    int32_t device_type;
    int32_t device_id;
} DLDevice;
typedef struct {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
} DLDataType;
typedef struct {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape;
    int64_t *strides;
    uint64_t byte_offset;
} DLTensor;
typedef struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self);
} DLManagedTensor;
enum { DL_CPU = 1 };

#define LONGEST_WAIT_SECONDS 9e9 /* of 64 bits of nanoseconds, as everywhere in Python */

/* Room.form, packed in Python: what a tensor is, less its place. */
typedef struct {
    uint8_t code;
    uint8_t bits;
    uint16_t reserved;
    int32_t ndim;
    int64_t shape[SHMBROKER_MAX_DIMS];
} Form;
_Static_assert(sizeof(Form) == 8 + 8 * SHMBROKER_MAX_DIMS, "as Room.form is packed");

typedef struct Lease {
    DLManagedTensor managed;
    int64_t shape[SHMBROKER_MAX_DIMS];
    PyObject *block;
    struct Home *home;
    struct Lease *next;
} Lease;

/* What leases need after their Leases object is gone. Every living lease has a share in it, and the Leases object one more. */
typedef struct Home {
    _Atomic long shares;
    _Atomic(Lease *) dead; /* pushed by deleters */
    Lease *collected;      /* taken off that list, the longest dead first; touched under the interpreter lock only */
    atomic_bool closed;
    atomic_int waiting;
    sem_t news;
    Py_buffer map;
} Home;

static bool interpreter_lives(void)
{
#if PY_VERSION_HEX >= 0x030d0000
    return Py_IsInitialized() && !Py_IsFinalizing();
#else
    return Py_IsInitialized() && !_Py_IsFinalizing();
#endif
}

/* The block of the longest dead lease, or NULL. Under the interpreter lock. */
static PyObject *pop_block(Home *home)
{
    if (home->collected == NULL) {
        if (atomic_load(&home->dead) == NULL)
            return NULL;
        Lease *lease = atomic_exchange(&home->dead, NULL);
        while (lease != NULL) {
            Lease *next = lease->next;
            lease->next = home->collected;
            home->collected = lease;
            lease = next;
        }
    }
    Lease *lease = home->collected;
    home->collected = lease->next;
    PyObject *block = lease->block;
    PyMem_RawFree(lease);
    return block;
}

static void drop_blocks(Home *home)
{
    PyObject *block;
    while ((block = pop_block(home)) != NULL)
        Py_DECREF(block);
}

/* Give up a share; the last one frees. Under the interpreter lock. */
static void drop_share(Home *home)
{
    if (atomic_fetch_sub_explicit(&home->shares, 1, memory_order_acq_rel) != 1)
        return;
    drop_blocks(home);
    PyBuffer_Release(&home->map);
    sem_destroy(&home->news);
    PyMem_RawFree(home);
}

static void lease_died(DLManagedTensor *managed)
{
    Lease *lease = managed->manager_ctx;
    Home *home = lease->home;
    Lease *before = atomic_load_explicit(&home->dead, memory_order_relaxed);
    do
        lease->next = before;
    while (!atomic_compare_exchange_weak(&home->dead, &before, lease));
    /* The lease is the collector's from here on; the share in home is still ours. A Leases object that closes after we looked collects it. */
    if (atomic_load(&home->waiting))
        sem_post(&home->news);
    if (!atomic_load(&home->closed)) {
        /* Not the last share: the Leases object has one until it has closed. */
        long left = atomic_fetch_sub_explicit(&home->shares, 1, memory_order_acq_rel) - 1;
        if (left > 0)
            return;
        atomic_fetch_add_explicit(&home->shares, 1, memory_order_acq_rel); /* it closed in between: ours is the last after all */
    }
    if (!interpreter_lives())
        return; /* the process ends, and its memory with it */
    PyGILState_STATE state = PyGILState_Ensure();
    drop_blocks(home);
    drop_share(home);
    PyGILState_Release(state);
}

static void capsule_died(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, "dltensor")) { /* nobody made a tensor of it */
        DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
        managed->deleter(managed);
    }
}

/* --- Leases ---------------------------------------------------------------------------------------------------------------------------------
 *
 * The leases of one arena: tensor(), pop(), wait().
 *
 *   Before   It was made: its __init__ returned. `mapping` is a writable buffer, `from_dlpack` makes a tensor of a DLPack capsule, once. tensor:
 *            the block at `offset` is the caller's to lend, and what Room.form tells of fits into it.
 *   Who      Any thread that holds the interpreter lock. tensor() and pop() are serialised by the arena's lock; wait() is not, may be in several
 *            threads at once, and lets go of the interpreter lock. Tensors may die in any thread, with the interpreter lock or without it.
 *   After    The mapping stays exported, and so mapped, until this object and the last tensor over it are gone. Every block that
 *            was lent comes out of pop() once, after its last tensor has died (A1), the longest dead first; those still lent when this object
 *            goes are let go of as they die. pop: None where nothing has died. wait: returns when a lease has died since the last pop(), when
 *            the time is over, and now and then before; who waits looks again.
 *   Failure  RuntimeError from a method of an object that was never made, or whose making failed, and from a second making; a making that fails
 *            leaves the object as it was, and may be tried again. tensor: ValueError for an offset that is no place in the mapping, TypeError for
 *            what is no offset or no room; then nothing was lent. Where from_dlpack raises, the block was lent, and comes out of pop() again.
 *            wait: ValueError for a negative time and for none (NaN), OverflowError for one beyond all clocks, TypeError for what is no
 *            time. No signal handler runs before it ends: who wants one to waits for short whiles.
 */

typedef struct {
    PyObject_HEAD
    Home *home; /* NULL: never made */
    PyObject *from_dlpack;
    PyObject *form_name; /* "form" */
} Leases;

static bool is_made(const Leases *self)
{
    if (self->home != NULL)
        return true;
    PyErr_SetString(PyExc_RuntimeError, "these Leases were never made: their __init__ was not called, or raised");
    return false;
}

static Home *open_home(PyObject *mapping)
{
    Home *home = PyMem_RawCalloc(1, sizeof *home);
    if (home == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    if (PyObject_GetBuffer(mapping, &home->map, PyBUF_WRITABLE) < 0) {
        PyMem_RawFree(home);
        return NULL;
    }
    sem_init(&home->news, 0, 0);
    atomic_init(&home->shares, 1);
    return home;
}

static int leases_init(Leases *self, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"mapping", "from_dlpack", NULL};
    PyObject *mapping, *from_dlpack;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OO", names, &mapping, &from_dlpack))
        return -1;
    PyObject *form_name = PyUnicode_InternFromString("form");
    Home *home = form_name ? open_home(mapping) : NULL;
    if (home == NULL) {
        Py_XDECREF(form_name);
        return -1;
    }
    if (self->home != NULL) { /* asked last: a buffer's own code may make the same object */
        PyErr_SetString(PyExc_RuntimeError, "Leases are made once");
        Py_DECREF(form_name);
        drop_share(home);
        return -1;
    }
    self->home = home;
    self->from_dlpack = Py_NewRef(from_dlpack);
    self->form_name = form_name;
    return 0;
}

static void leases_dealloc(Leases *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->home != NULL) {
        atomic_store(&self->home->closed, true);
        drop_blocks(self->home);
        drop_share(self->home);
    }
    Py_XDECREF(self->from_dlpack);
    Py_XDECREF(self->form_name);
    type->tp_free(self);
    Py_DECREF(type);
}

/* tensor(room, offset, block) -> torch.Tensor */
static PyObject *leases_tensor(Leases *self, PyObject *const *arguments, Py_ssize_t count)
{
    Form form;
    if (!is_made(self))
        return NULL;
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "tensor(room, offset: int, block)");
        return NULL;
    }
    PyObject *packed = PyObject_GetAttr(arguments[0], self->form_name);
    if (packed == NULL)
        return NULL;
    bool is_form = PyBytes_Check(packed) && PyBytes_GET_SIZE(packed) == (Py_ssize_t)sizeof form;
    if (is_form)
        memcpy(&form, PyBytes_AS_STRING(packed), sizeof form);
    Py_DECREF(packed);
    if (!is_form) {
        PyErr_Format(PyExc_TypeError, "a room's form is %zu bytes", sizeof form);
        return NULL;
    }
    uint64_t offset;
    if (!as_unsigned(arguments[1], UINT64_MAX, "offset", &offset))
        return NULL;
    Home *home = self->home;
    uint64_t nbytes = form.bits / 8;
    bool fits = form.bits % 8 == 0 && form.ndim >= 0 && form.ndim <= SHMBROKER_MAX_DIMS;
    for (int i = 0; fits && i < form.ndim; i++)
        fits = form.shape[i] >= 0 && !__builtin_mul_overflow(nbytes, (uint64_t)form.shape[i], &nbytes);
    if (!fits || offset > (uint64_t)home->map.len || nbytes > (uint64_t)home->map.len - offset) {
        PyErr_Format(PyExc_ValueError, "a tensor at %llu does not lie in %zd bytes", (unsigned long long)offset, home->map.len);
        return NULL;
    }
    Lease *lease = PyMem_RawMalloc(sizeof *lease);
    if (lease == NULL)
        return PyErr_NoMemory();
    memcpy(lease->shape, form.shape, sizeof form.shape);
    lease->managed = (DLManagedTensor){
        .dl_tensor = {
            .data = (uint8_t *)home->map.buf + offset,
            .device = {DL_CPU, 0},
            .ndim = form.ndim,
            .dtype = {form.code, form.bits, 1},
            .shape = lease->shape,
        },
        .manager_ctx = lease,
        .deleter = lease_died,
    };
    PyObject *capsule = PyCapsule_New(&lease->managed, "dltensor", capsule_died);
    if (capsule == NULL) {
        PyMem_RawFree(lease);
        return NULL;
    }
    lease->block = Py_NewRef(arguments[2]);
    lease->home = home;
    atomic_fetch_add_explicit(&home->shares, 1, memory_order_relaxed);
    PyObject *tensor = PyObject_CallOneArg(self->from_dlpack, capsule);
    Py_DECREF(capsule);
    return tensor;
}

/* pop() -> block | None */
static PyObject *leases_pop(Leases *self, PyObject *Py_UNUSED(ignored))
{
    if (!is_made(self))
        return NULL;
    PyObject *block = pop_block(self->home);
    if (block == NULL)
        Py_RETURN_NONE;
    return block;
}

/* wait(seconds): until a lease dies, or so long */
static PyObject *leases_wait(Leases *self, PyObject *argument)
{
    if (!is_made(self))
        return NULL;
    double seconds = PyFloat_AsDouble(argument);
    if (seconds == -1.0 && PyErr_Occurred())
        return NULL;
    if (!(seconds >= 0 && seconds <= LONGEST_WAIT_SECONDS)) {
        bool beyond = seconds > LONGEST_WAIT_SECONDS || seconds < -LONGEST_WAIT_SECONDS;
        PyErr_SetString(beyond ? PyExc_OverflowError : PyExc_ValueError, "seconds to wait are a number from 0 to what a clock can tell");
        return NULL;
    }
    Home *home = self->home;
    if (home->collected != NULL)
        Py_RETURN_NONE;
    Py_INCREF(self);
    Py_BEGIN_ALLOW_THREADS
    atomic_fetch_add(&home->waiting, 1);
    if (atomic_load(&home->dead) == NULL && seconds > 0) {
#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 30)
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        uint64_t end = (uint64_t)until.tv_nsec + (uint64_t)(seconds * 1e9);
        until.tv_sec += (time_t)(end / 1000000000u);
        until.tv_nsec = (long)(end % 1000000000u);
        while (sem_clockwait(&home->news, CLOCK_MONOTONIC, &until) < 0 && errno == EINTR && atomic_load(&home->dead) == NULL)
            ;
#else /* no wait on a clock that nobody sets: a short nap, and the caller looks again */
        struct timespec nap = {0, seconds < 1e-3 ? (long)(seconds * 1e9) : 1000000};
        nanosleep(&nap, NULL);
#endif
    }
    atomic_fetch_sub(&home->waiting, 1);
    Py_END_ALLOW_THREADS
    Py_DECREF(self);
    Py_RETURN_NONE;
}

static PyMethodDef leases_methods[] = {
    {"tensor", METHOD(leases_tensor), METH_FASTCALL, "A tensor over a block, whose death gives the block back."},
    {"pop", METHOD(leases_pop), METH_NOARGS, "A block whose last tensor has died, the longest dead first, or None."},
    {"wait", METHOD(leases_wait), METH_O, "Wait until a lease dies, for so many seconds at most."},
    {NULL},
};
static PyType_Slot leases_slots[] = {
    {Py_tp_doc, "The leases of one arena."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, leases_init},
    {Py_tp_dealloc, leases_dealloc},
    {Py_tp_methods, leases_methods},
    {0, NULL},
};
static PyType_Spec leases_spec = {
    .name = "shmbroker.arena._leases.Leases",
    .basicsize = sizeof(Leases),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = leases_slots,
};

static int module_exec(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &leases_spec, NULL);
    if (type == NULL)
        return -1;
    int failed = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return failed;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmbroker.arena._leases",
    .m_doc = "Leases, compiled. Used through shmbroker.arena.arena.",
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__leases(void)
{
    return PyModuleDef_Init(&module_def);
}
