/* The ends of the queues, compiled: what shmbroker/lane/python_ends.py says, for a tenth of its cost. Here are the module, spin() and what a sleeper does;
 * the ends stand in _submission_ends.c and _completion_ends.c, what they share in _queue.h and _ends.h, and what they do to a
 * queue in the core, shmbroker/include/shmbroker/.
 *
 * Optional: without a compiler, or with SHMBROKER_PURE_PYTHON=1, the classes of python_ends.py do the same, and the same tests run on both.
 *
 * Nothing here believes the other side: every position is counted privately, every frame is copied before it is looked at, and every count in
 * the copy is clamped before it is used.
 */

#include "_ends.h"

#include <sched.h>
#include <time.h>

enum {
    LOOKS_FOR_EACH_CLOCK = 32, /* a look costs a few ns, the clock some 25 */
    IMPOLITE_NS = 50000,       /* a spin that takes longer makes way for whoever wants the core, each time it looks at the clock */
};

typedef struct {
    PyTypeObject *submission_receiver, *completion_receiver;
} State;

/* --- spin -----------------------------------------------------------------------------------------------------------------------------------
 *
 * spin(receivers, seconds) -> bool: look for a frame at any of the receivers, once at least, and for so long, a second at most.
 *
 *   Before   `receivers` is a tuple of receivers of this module, all of them made.
 *   Who      Any thread with the interpreter lock, which is let go meanwhile: other threads of a process that waits can work, but for take() of these
 *            receivers, whose positions are read here.
 *   After    Whether there is a frame at one of them; nothing is taken.
 *            The tuple is held, so the receivers live, and each keeps its segment mapped: whoever else lets go of them, or closes a lane, takes
 *            no memory from under the loop. No signal handler runs before the end, hence the second.
 *   Failure  TypeError and RuntimeError, before the lock is let go.
 */

static bool is_receiver(const State *state, PyObject *object)
{
    return Py_IS_TYPE(object, state->submission_receiver) || Py_IS_TYPE(object, state->completion_receiver);
}

static inline const Receiver *receiver_at(PyObject *receivers, Py_ssize_t i)
{
    return &((const AnyReceiver *)PyTuple_GET_ITEM(receivers, i))->receiver;
}

static bool are_receivers(const State *state, PyObject *receivers)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(receivers); i++) {
        if (!is_receiver(state, PyTuple_GET_ITEM(receivers, i))) {
            PyErr_SetString(PyExc_TypeError, "spin takes the receivers of this module");
            return false;
        }
        if (!is_made(&receiver_at(receivers, i)->queue))
            return false;
    }
    return true;
}

static PyObject *spin(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    if (count != 2 || !PyTuple_Check(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "spin(receivers: tuple, seconds: float)");
        return NULL;
    }
    double seconds = PyFloat_AsDouble(arguments[1]);
    if (seconds == -1.0 && PyErr_Occurred())
        return NULL;
    PyObject *receivers = arguments[0];
    if (!are_receivers(PyModule_GetState(module), receivers))
        return NULL;
    Py_ssize_t watched = PyTuple_GET_SIZE(receivers);
    bool found = false;
    Py_INCREF(receivers);
    Py_BEGIN_ALLOW_THREADS
    uint64_t now = clock_ns(), impolite_until = now + IMPOLITE_NS;
    uint64_t until = now + (seconds > 0 ? (uint64_t)(seconds < 1 ? seconds * 1e9 : 1e9) : 0);
    do {
        if (now > impolite_until)
            sched_yield();
        for (int look = 0; look < LOOKS_FOR_EACH_CLOCK && !found; look++) {
            for (Py_ssize_t i = 0; i < watched && !found; i++)
                found = is_ready(receiver_at(receivers, i));
            if (!found)
                relax();
        }
        now = clock_ns();
    } while (!found && now < until);
    Py_END_ALLOW_THREADS
    Py_DECREF(receivers);
    return PyBool_FromLong(found);
}

/* --- before_sleep, after_sleep -----------------------------------------------------------------------------------------------------------------
 *
 * before_sleep(sleeping), after_sleep(sleeping): put up, and down, the words of who is about to block, or was.
 *
 *   Before   `sleeping` is a sequence of pairs: a writable memory, and the index of a 64-bit word in it.
 *   Who      The process whose words they are, one thread at a time, with the interpreter lock.
 *   After    All words are up (down). Up: all queues are looked at once more before the caller blocks (D1); each word's fence is passed.
 *   Failure  TypeError for what is no such sequence, BufferError for a memory that cannot be written, IndexError for a word that is not in it; those
 *            before it are up (down).
 */

static bool word_of(PyObject *pair, void (*done)(shmbroker_word *))
{
    PyObject *memory;
    Py_ssize_t index;
    Py_buffer words;
    if (!PyTuple_Check(pair)) {
        PyErr_SetString(PyExc_TypeError, "a word to sleep under is a tuple (memory, index)");
        return false;
    }
    if (!PyArg_ParseTuple(pair, "On", &memory, &index) || PyObject_GetBuffer(memory, &words, PyBUF_WRITABLE) < 0)
        return false;
    bool there = index >= 0 && index < words.len / (Py_ssize_t)sizeof(shmbroker_word);
    if (there)
        done(shmbroker_word_at((uint64_t *)words.buf + index));
    else
        PyErr_SetString(PyExc_IndexError, "a word to sleep under does not lie in its memory");
    PyBuffer_Release(&words);
    return there;
}

static PyObject *for_each_word(PyObject *sleeping, void (*done)(shmbroker_word *))
{
    PyObject *pairs = PySequence_Fast(sleeping, "the words to sleep under are a sequence of pairs");
    bool all = pairs != NULL;
    for (Py_ssize_t i = 0; all && i < PySequence_Fast_GET_SIZE(pairs); i++) {
        PyObject *pair = Py_NewRef(PySequence_Fast_GET_ITEM(pairs, i)); /* an index is Python code where it is no int, and may change the list */
        all = word_of(pair, done);
        Py_DECREF(pair);
    }
    Py_XDECREF(pairs);
    return all ? Py_NewRef(Py_None) : NULL;
}

static PyObject *before_sleep(PyObject *Py_UNUSED(module), PyObject *sleeping)
{
    return for_each_word(sleeping, shmbroker_before_sleep);
}

static PyObject *after_sleep(PyObject *Py_UNUSED(module), PyObject *sleeping)
{
    return for_each_word(sleeping, shmbroker_after_sleep);
}

/* fence(): for whoever writes words in Python that others read in order (L5). */
static PyObject *fence(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    SHMBROKER_FENCE();
    Py_RETURN_NONE;
}

/* --- module ----------------------------------------------------------------------------------------------------------------------------- */

static int module_exec(PyObject *module)
{
    State *state = PyModule_GetState(module);
    PyType_Spec *specs[] = {&submission_sender_spec, &submission_receiver_spec, &completion_sender_spec, &completion_receiver_spec};
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        PyObject *type = PyType_FromModuleAndSpec(module, specs[i], NULL);
        if (type == NULL || PyModule_AddType(module, (PyTypeObject *)type) < 0) {
            Py_XDECREF(type);
            return -1;
        }
        if (specs[i] == &submission_receiver_spec)
            state->submission_receiver = (PyTypeObject *)Py_NewRef(type);
        else if (specs[i] == &completion_receiver_spec)
            state->completion_receiver = (PyTypeObject *)Py_NewRef(type);
        Py_DECREF(type);
    }
    return PyModule_AddIntConstant(module, "LAYOUT_VERSION", SHMBROKER_LAYOUT_VERSION);
}

static int module_clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->submission_receiver);
    Py_CLEAR(state->completion_receiver);
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    Py_VISIT(state->submission_receiver);
    Py_VISIT(state->completion_receiver);
    return 0;
}

static PyMethodDef module_methods[] = {
    {"before_sleep", METHOD(before_sleep), METH_O, "Put up the words of who is about to block (D1)."},
    {"after_sleep", METHOD(after_sleep), METH_O, "Put them down."},
    {"fence", METHOD(fence), METH_NOARGS, "A full memory barrier, on every processor."},
    {"spin", METHOD(spin), METH_FASTCALL, "Look for a frame at any of the receivers for so long; whether there is one."},
    {NULL},
};
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmbroker.lane._ends",
    .m_doc = "The ends of the queues, compiled. Used through shmbroker.lane.ends.",
    .m_size = sizeof(State),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__ends(void)
{
    return PyModuleDef_Init(&module_def);
}
