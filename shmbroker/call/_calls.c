/* Calls, compiled: what RemoteOp.__call__ and CapturedCall.replay do, for the ordinary one of them; anything else is left to those.
 *
 * Ordinary is a call by position, with plain tensors that begin a block each, or are small and contiguous, and are copied; of a kind that was met
 * before; for whose outputs and copies there are dead blocks of their sizes; on a channel of the shm lane that has nothing outstanding, while nobody
 * reads completions. What makes it so is looked at first, and where anything is otherwise nothing was done.
 *
 * Nothing here takes a lock. Between the look at the channel and the frame's publication, and between the look at who reads completions and the taking
 * of one, the interpreter lock is held, no Python code runs and nothing is allocated that the collector counts: no other thread can come between. In
 * between the call is outstanding, as every call is: registered, with the holds of its blocks (A5), so that whoever else reads completions, closes the
 * channel or finds the worker dead deals with it; then its own outcome is read off its record.
 *
 *   Before   set_up() was called with the classes that are told there.
 *   Who      Any thread that holds the interpreter lock.
 *   Failure  What cannot be ordinary is called by Python, which raises as is documented there. After the publication: MemoryError where an output's
 *            tensor cannot be made; the call stays outstanding until it is answered, and so holds its blocks.
 */

#include "_calls.h"

enum {
    KINDS = 256,              /* that one op knows at most; beyond that the record starts over, as in Python */
    LOOK_NS = 20000,          /* with the interpreter lock, at most: longer waits are left to Python, which lets go of it */
    LEAST_LOOK_NS = 5000,     /* also where a client is not to spin: to sleep and be woken takes longer, and costs more */
    LOOKS_FOR_EACH_CLOCK = 16, /* a look costs a few ns, the clock some 25 */
    SHORTEST_LIMIT_NS = 10 * LOOK_NS,
    MOST_COPIED_BYTES = 64 << 10, /* of an input, with the interpreter lock: some 5 us; larger ones torch copies without it, and by several threads */
};

Known known;

/* --- Ends ------------------------------------------------------------------------------------------------------------------------------------
 *
 * The client's ends of one channel's queues, until they are closed: what keeps the segment mapped.
 */

typedef struct {
    PyObject_HEAD
    PyObject *sender, *receiver; /* NULL: closed */
} Ends;

static int ends_init(Ends *self, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"sender", "receiver", NULL};
    PyObject *sender, *receiver;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O!O!", names, known.submission_sender, &sender, known.completion_receiver, &receiver)
        || !is_made(&((AnySender *)sender)->sender.queue) || !is_made(&((AnyReceiver *)receiver)->receiver.queue))
        return -1;
    Py_XSETREF(self->sender, Py_NewRef(sender));
    Py_XSETREF(self->receiver, Py_NewRef(receiver));
    return 0;
}

static PyObject *ends_close(Ends *self, PyObject *Py_UNUSED(ignored))
{
    Py_CLEAR(self->sender);
    Py_CLEAR(self->receiver);
    Py_RETURN_NONE;
}

static void ends_dealloc(Ends *self)
{
    Py_CLEAR(self->sender);
    Py_CLEAR(self->receiver);
    free_object((PyObject *)self);
}

static PyMethodDef ends_methods[] = {
    {"close", METHOD(ends_close), METH_NOARGS, "Let go of the ends, and of the segment. A second time does nothing."},
    {NULL},
};
static PyType_Slot ends_slots[] = {
    {Py_tp_doc, "The client's ends of one channel's queues, until they are closed."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, ends_init},
    {Py_tp_dealloc, ends_dealloc},
    {Py_tp_methods, ends_methods},
    {0, NULL},
};
static PyType_Spec ends_spec = {
    .name = "shmbroker.call._calls.Ends",
    .basicsize = sizeof(Ends),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = ends_slots,
};

/* --- Kind: a plan as it is looked up here --------------------------------------------------------------------------------------------------- */

typedef struct {
    DLDataType dtype;
    int32_t ndim;
    int64_t shape[SHMBROKER_MAX_DIMS], strides[SHMBROKER_MAX_DIMS];
    PyObject *block_bytes; /* of a block for a copy; NULL where none is made here */
    size_t nbytes;
} InputForm;

typedef struct {
    PyObject *nbytes; /* of its block; the room's own, which the plan keeps */
    Form form;
} OutputRoom;

typedef struct {
    long uses;
    PyObject *plan;
    PyObject *packed; /* of its frame, behind the sequence number */
    bool single;
    int input_count, output_count;
    long long sent_bytes, received_bytes;
    InputForm inputs[SHMBROKER_MAX_TENSORS];
    OutputRoom outputs[SHMBROKER_MAX_TENSORS];
} Kind;

/* Which tensors of a call lie where. */
typedef struct {
    uint64_t offsets[SHMBROKER_MAX_TENSORS];
    uint32_t generations[SHMBROKER_MAX_TENSORS];
} Places;

static Kind *kind_of_plan(PyObject *plan)
{
    Kind *kind = PyMem_Calloc(1, sizeof *kind);
    if (kind == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    kind->uses = 1;
    kind->plan = Py_NewRef(plan);
    kind->packed = Py_NewRef(in_slot(in_slot(plan, known.at.template), known.at.packed));
    kind->single = in_slot(plan, known.at.single) == Py_True;
    kind->sent_bytes = PyLong_AsLongLong(in_slot(plan, known.at.sent_bytes));
    kind->received_bytes = PyLong_AsLongLong(in_slot(plan, known.at.received_bytes));
    return kind;
}

static void let_go_of_kind(Kind *kind)
{
    if (--kind->uses > 0)
        return;
    for (int i = 0; i < kind->input_count; i++)
        Py_XDECREF(kind->inputs[i].block_bytes);
    Py_DECREF(kind->plan);
    Py_DECREF(kind->packed);
    PyMem_Free(kind);
}

/* Note how large a copy is, where it may be made here: of a contiguous tensor that is small and not empty. */
static void note_copy(InputForm *form)
{
    size_t nbytes = (size_t)form->dtype.bits / 8 * form->dtype.lanes;
    int64_t step = 1;
    if (form->dtype.bits % 8)
        return;
    for (int i = form->ndim - 1; i >= 0; i--) {
        if (form->strides[i] != step)
            return;
        step *= form->shape[i] ? form->shape[i] : 1;
        if (__builtin_mul_overflow(nbytes, (size_t)form->shape[i], &nbytes))
            return;
    }
    if (nbytes == 0 || nbytes > MOST_COPIED_BYTES)
        return;
    form->nbytes = nbytes;
    form->block_bytes = PyLong_FromSize_t((nbytes + SHMBROKER_ALIGNMENT - 1) / SHMBROKER_ALIGNMENT * SHMBROKER_ALIGNMENT);
    PyErr_Clear();
}

static inline bool is_of_form(const DLTensor *tensor, const InputForm *form)
{
    size_t nbytes = (size_t)tensor->ndim * sizeof(int64_t);
    return tensor->ndim == form->ndim && memcmp(&tensor->dtype, &form->dtype, sizeof(DLDataType)) == 0
           && memcmp(tensor->shape, form->shape, nbytes) == 0 && memcmp(tensor->strides, form->strides, nbytes) == 0;
}

/* --- FastPath --------------------------------------------------------------------------------------------------------------------------------
 *
 * What one op's calls need, and the kinds that it has met.
 */

typedef struct {
    PyObject_HEAD
    PyObject *pair, *loop, *arena, *statistics;
    PyObject *lane;
    PyObject *is_led;   /* of the loop: whether somebody reads completions */
    PyObject *call_ids; /* an iterator */
    PyObject *followers;
    Ends *ends;
    uint64_t address, nbytes; /* where offset 0 lies, and how far the segment reaches */
    unsigned long long limit_ns, look_ns;
    int in_place; /* the op writes into inputs, so that copies are copied back: by Python */
    Kind *kinds[KINDS];
    int kind_count;
    CallRecord *spare; /* for the next call */
    unsigned long long made; /* calls and replays, so far */
} FastPath;

static int path_traverse(FastPath *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->pair);
    Py_VISIT(self->loop);
    Py_VISIT(self->arena);
    Py_VISIT(self->statistics);
    Py_VISIT(self->lane);
    Py_VISIT(self->is_led);
    Py_VISIT(self->followers);
    Py_VISIT(self->spare);
    for (int i = 0; i < self->kind_count; i++)
        Py_VISIT(self->kinds[i]->plan);
    return 0;
}

static void forget_kinds(FastPath *self)
{
    while (self->kind_count > 0)
        let_go_of_kind(self->kinds[--self->kind_count]);
}

static int path_clear(FastPath *self)
{
    forget_kinds(self);
    Py_CLEAR(self->pair);
    Py_CLEAR(self->loop);
    Py_CLEAR(self->arena);
    Py_CLEAR(self->statistics);
    Py_CLEAR(self->lane);
    Py_CLEAR(self->is_led);
    Py_CLEAR(self->call_ids);
    Py_CLEAR(self->followers);
    Py_CLEAR(self->ends);
    Py_CLEAR(self->spare);
    return 0;
}

static void path_dealloc(FastPath *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    path_clear(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

/* FastPath(pair, loop, arena, statistics, lane, is_led, call_ids, followers, ends, address, nbytes, limit_ns, look_ns, in_place) */
static int path_init(FastPath *self, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"pair", "loop", "arena", "statistics", "lane", "is_led", "call_ids", "followers", "ends", "address", "nbytes", "limit_ns", "look_ns", "in_place", NULL};
    PyObject *pair, *loop, *arena, *statistics, *lane, *is_led, *call_ids, *followers, *ends;
    unsigned long long address, nbytes, limit_ns, look_ns;
    int in_place;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOOOOOOO!OKKKKp", names, &pair, &loop, &arena, &statistics, &lane, &is_led, &call_ids,
                                     &PyList_Type, &followers, &ends, &address, &nbytes, &limit_ns, &look_ns, &in_place))
        return -1;
    if (self->pair != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "a FastPath is made once");
        return -1;
    }
    self->pair = Py_NewRef(pair);
    self->loop = Py_NewRef(loop);
    self->arena = Py_NewRef(arena);
    self->statistics = Py_NewRef(statistics);
    self->lane = Py_NewRef(lane);
    self->is_led = Py_NewRef(is_led);
    self->call_ids = Py_NewRef(call_ids);
    self->followers = Py_NewRef(followers);
    self->ends = (Ends *)Py_NewRef(ends);
    self->address = address;
    self->nbytes = nbytes;
    self->limit_ns = limit_ns;
    self->in_place = in_place;
    self->look_ns = look_ns < LEAST_LOOK_NS ? LEAST_LOOK_NS : look_ns < LOOK_NS ? look_ns : LOOK_NS;
    return 0;
}

/* learn(plan, inputs): that tensors of the forms of `inputs` are called by `plan`. Of a kind that is never ordinary it learns nothing. */
static PyObject *path_learn(FastPath *self, PyObject *const *arguments, Py_ssize_t count)
{
    if (count != 2 || !PyTuple_Check(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "learn(plan, inputs: tuple)");
        return NULL;
    }
    PyObject *plan = arguments[0], *inputs = arguments[1], *rooms = in_slot(plan, known.at.rooms);
    Py_ssize_t input_count = PyTuple_GET_SIZE(inputs), output_count = PyTuple_GET_SIZE(rooms);
    if (input_count + output_count > SHMBROKER_MAX_TENSORS)
        Py_RETURN_NONE;
    Kind *kind = kind_of_plan(plan);
    if (kind == NULL)
        return NULL;
    for (Py_ssize_t i = 0; i < input_count; i++) {
        DLTensor lent;
        PyObject *tensor = PyTuple_GET_ITEM(inputs, i);
        if (!Py_IS_TYPE(tensor, known.tensor) || known.exchange->borrow(tensor, &lent) < 0 || lent.ndim > SHMBROKER_MAX_DIMS
            || lent.dtype.code == DL_COMPLEX)
            goto never;
        InputForm *form = &kind->inputs[i];
        form->dtype = lent.dtype;
        form->ndim = lent.ndim;
        memcpy(form->shape, lent.shape, (size_t)lent.ndim * sizeof(int64_t));
        memcpy(form->strides, lent.strides, (size_t)lent.ndim * sizeof(int64_t));
        kind->input_count = (int)i + 1;
        if (!self->in_place)
            note_copy(form);
    }
    for (Py_ssize_t i = 0; i < output_count; i++) {
        PyObject *room = PyTuple_GET_ITEM(rooms, i), *form = in_slot(room, known.at.form);
        if (in_slot(room, known.at.as_integers) != Py_False || PyBytes_GET_SIZE(form) != sizeof(Form))
            goto never;
        kind->outputs[i].nbytes = in_slot(room, known.at.room_nbytes);
        memcpy(&kind->outputs[i].form, PyBytes_AS_STRING(form), sizeof(Form));
    }
    kind->output_count = (int)output_count;
    if (self->kind_count == KINDS)
        forget_kinds(self);
    self->kinds[self->kind_count++] = kind;
    Py_RETURN_NONE;
never:
    PyErr_Clear();
    let_go_of_kind(kind);
    Py_RETURN_NONE;
}

/* The kind of such tensors, or NULL. The one that is found moves to the front, as the next call is most often like this one. */
static inline Kind *kind_of(FastPath *self, const DLTensor *tensors, Py_ssize_t count)
{
    for (int i = 0; i < self->kind_count; i++) {
        Kind *kind = self->kinds[i];
        bool same = kind->input_count == count;
        for (Py_ssize_t j = 0; same && j < count; j++)
            same = is_of_form(&tensors[j], &kind->inputs[j]);
        if (same) {
            if (i > 0) {
                memmove(&self->kinds[1], &self->kinds[0], (size_t)i * sizeof(Kind *));
                self->kinds[0] = kind;
            }
            return kind;
        }
    }
    return NULL;
}

static inline const uint8_t *data_of(const DLTensor *tensor)
{
    return tensor->data == NULL ? NULL : (const uint8_t *)tensor->data + tensor->byte_offset;
}

/* Whether it lies outside of the client's segment. */
static inline bool is_elsewhere(const FastPath *self, const DLTensor *tensor)
{
    return (uint64_t)(uintptr_t)data_of(tensor) - self->address >= self->nbytes;
}

/* How many bytes the elements of a contiguous tensor are; SIZE_MAX where that is beyond counting. */
static inline size_t bytes_of(const DLTensor *tensor)
{
    size_t nbytes = (size_t)tensor->dtype.bits / 8 * tensor->dtype.lanes;
    for (int i = 0; i < tensor->ndim; i++)
        if (__builtin_mul_overflow(nbytes, (size_t)tensor->shape[i], &nbytes))
            return SIZE_MAX;
    return nbytes;
}

/* Borrow all inputs; how many of them lie elsewhere, or -1 where one cannot be borrowed, or lies on a device. Runs no Python code. */
static int borrow_inputs(const FastPath *self, PyObject *inputs, DLTensor *tensors)
{
    int elsewhere = 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(inputs); i++) {
        if (known.exchange->borrow(PyTuple_GET_ITEM(inputs, i), &tensors[i]) < 0) {
            PyErr_Clear();
            return -1;
        }
        if (tensors[i].device.device_type != DL_CPU || tensors[i].ndim > SHMBROKER_MAX_DIMS)
            return -1;
        elsewhere += is_elsewhere(self, &tensors[i]);
    }
    return elsewhere;
}

/* --- looks: none of these runs Python code, or allocates what the collector counts, unless it says so --------------------------------------- */

static inline bool is_false(PyObject *asked)
{
    if (asked == NULL) {
        PyErr_Clear();
        return false;
    }
    Py_DECREF(asked);
    return asked == Py_False;
}

static bool read_unsigned(PyObject *number, unsigned long long *value)
{
    if (number == NULL)
        return false;
    *value = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    return !PyErr_Occurred();
}

/* Whether its bytes alone are its values, and are there, for one that is to be copied: no tensor of torch.func's, and not beyond its storage, which may have
 * been resized. Python refuses any other. May run Python code. */
static bool has_own_bytes(PyObject *tensor, const uint8_t *data, size_t nbytes)
{
    if (data == NULL || !is_false(PyObject_CallOneArg(known.is_transformed, tensor)))
        return false;
    unsigned long long room, begin;
    PyObject *storage = PyObject_CallMethodNoArgs(tensor, known.untyped_storage);
    bool read = storage != NULL && read_unsigned(PyObject_CallMethodNoArgs(storage, known.nbytes), &room)
                && read_unsigned(PyObject_CallMethodNoArgs(storage, known.data_ptr), &begin);
    Py_XDECREF(storage);
    if (!read)
        PyErr_Clear();
    uint64_t at = (uint64_t)(uintptr_t)data;
    return read && at >= begin && at - begin <= room && nbytes <= room - (at - begin);
}

/* Whether torch takes it for more than its bytes: it wants a gradient, or is shown with another sign. Runs Python code under a torch function mode. */
static inline bool is_plain(PyObject *tensor)
{
    return Py_IS_TYPE(tensor, known.tensor) && is_false(known.requires_grad->get(tensor, known.requires_grad->closure))
           && is_false(known.is_neg->ml_meth(tensor, NULL));
}

/* Whether forward-mode derivatives are taken. */
static inline bool is_differentiating(void)
{
    PyObject *level = PyDict_GetItemWithError(known.levels, known.level_name);
    return level == NULL || !PyLong_Check(level) || PyLong_AsLong(level) >= 0;
}

static inline bool is_empty(PyObject *sized)
{
    return PyObject_Size(sized) == 0;
}

/* Whether nobody reads completions, or wants to. */
static inline bool may_read(const FastPath *self)
{
    PyObject *wanted = in_slot(self->loop, known.at.wanted);
    return self->ends->receiver != NULL && PyLong_AsLong(wanted) == 0 && is_false(PyObject_CallNoArgs(self->is_led));
}

/* Whether the channel is open and has nothing on its way, or due. */
static inline bool is_at_rest(const FastPath *self)
{
    PyObject *pair = self->pair;
    return self->ends->sender != NULL && in_slot(pair, known.at.lost) == Py_None && in_slot(pair, known.at.lane) == self->lane
           && PyDict_GET_SIZE(in_slot(pair, known.at.outstanding)) == 0 && is_empty(in_slot(pair, known.at.due))
           && PyList_GET_SIZE(self->followers) == 0 && may_read(self);
}

static inline uint64_t number_in(PyObject *object, Py_ssize_t offset)
{
    return PyLong_AsUnsignedLongLong(in_slot(object, offset));
}

/* --- placing: what Arena.place_now does where dead blocks of the sizes are there ------------------------------------------------------------ */

/* Where a block belongs among the idle ones of its size: those that lie further on come first. */
static Py_ssize_t place_of(PyObject *same, PyObject *block)
{
    uint64_t offset = number_in(block, known.at.offset);
    Py_ssize_t low = 0, high = PyList_GET_SIZE(same);
    while (low < high) {
        Py_ssize_t middle = (low + high) / 2;
        if (number_in(PyList_GET_ITEM(same, middle), known.at.offset) > offset)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Lay the blocks by that have died since the last time. False: Python is to look after it. Runs no Python code. */
static bool collect(FastPath *self)
{
    PyObject *arena = self->arena, *leases = in_slot(arena, known.at.leases);
    if (leases == NULL || !Py_IS_TYPE(leases, known.leases) || in_slot(arena, known.at.busy) != Py_False)
        return false;
    PyObject *block;
    Py_INCREF(leases);
    while ((block = known.lease->pop(leases)) != NULL) {
        bool laid_by = false;
        if (Py_REFCNT(in_slot(block, known.at.hold)) > 1) {
            laid_by = PyList_Append(in_slot(arena, known.at.named), block) == 0;
        } else {
            PyObject *nbytes = in_slot(block, known.at.nbytes), *idle = in_slot(arena, known.at.idle);
            PyObject *same = PyDict_GetItemWithError(idle, nbytes);
            /* A list for a size that is new is made by Python, which looks again at those that are named: to make one here could run a finaliser. */
            laid_by = (same != NULL ? PyList_Insert(same, place_of(same, block), block) : PyList_Append(in_slot(arena, known.at.named), block)) == 0;
            if (laid_by && same != NULL) {
                PyObject *count = PyLong_FromLong(PyLong_AsLong(in_slot(arena, known.at.idle_count)) + 1);
                laid_by = count != NULL;
                if (laid_by)
                    set_slot(arena, known.at.idle_count, count);
            }
        }
        if (!laid_by) { /* no memory for a list: the block is lost to the arena, and no other harm is done */
            PyErr_Clear();
            break;
        }
        Py_DECREF(block);
    }
    Py_DECREF(leases);
    return block == NULL && PyList_GET_SIZE(in_slot(arena, known.at.named)) == 0;
}

/* The first idle block of this size in the arena, taken off its list; NULL where there is none. As Arena._idle_block and RingAllocator.place_again. */
static PyObject *idle_block(FastPath *self, PyObject *nbytes, unsigned long long now_ns)
{
    PyObject *arena = self->arena, *ring = in_slot(arena, known.at.ring);
    PyObject *same = PyDict_GetItemWithError(in_slot(arena, known.at.idle), nbytes);
    Py_ssize_t last = same == NULL ? -1 : PyList_GET_SIZE(same) - 1;
    if (last < 0)
        return NULL;
    uint64_t placed = number_in(ring, known.at.placed) + 1;
    PyObject *count = PyLong_FromLong(PyLong_AsLong(in_slot(arena, known.at.idle_count)) - 1);
    PyObject *placed_number = PyLong_FromUnsignedLongLong(placed), *placed_at = PyFloat_FromDouble((double)now_ns * 1e-9);
    PyObject *generation = PyLong_FromUnsignedLongLong((placed - 1) % UINT32_MAX + 1);
    PyObject *block = Py_NewRef(PyList_GET_ITEM(same, last));
    if (count == NULL || placed_number == NULL || placed_at == NULL || generation == NULL || PyList_SetSlice(same, last, last + 1, NULL) < 0) {
        PyErr_Clear();
        Py_XDECREF(count);
        Py_XDECREF(placed_number);
        Py_XDECREF(placed_at);
        Py_XDECREF(generation);
        Py_DECREF(block);
        return NULL;
    }
    set_slot(arena, known.at.idle_count, count);
    set_slot(ring, known.at.placed, placed_number);
    set_slot(block, known.at.placed_at, placed_at);
    set_slot(block, known.at.generation, generation);
    return block;
}

/* Lease a block for each output, and note places and holds. False: none is leased. */
static bool lend_outputs(FastPath *self, const Kind *kind, CallRecord *record, Places *places, struct Lease **leases, unsigned long long now_ns)
{
    PyObject *arena = self->arena, *leases_of_arena = in_slot(arena, known.at.leases);
    int lent = 0;
    if (in_slot(arena, known.at.busy) != Py_False || !Py_IS_TYPE(leases_of_arena, known.leases))
        return false;
    for (; lent < kind->output_count; lent++) {
        PyObject *block = idle_block(self, kind->outputs[lent].nbytes, now_ns);
        if (block == NULL)
            break;
        int at = kind->input_count + lent;
        places->offsets[at] = number_in(block, known.at.offset);
        places->generations[at] = (uint32_t)number_in(block, known.at.generation);
        leases[lent] = known.lease->lend(leases_of_arena, &kind->outputs[lent].form, places->offsets[at], block);
        if (leases[lent] == NULL) { /* no memory: the block is lost to the arena, and no other harm is done */
            PyErr_Clear();
            Py_DECREF(block);
            break;
        }
        record->held[record->held_count++] = Py_NewRef(in_slot(block, known.at.hold));
        Py_DECREF(block); /* the lease has it, and the arena's own table */
    }
    if (lent == kind->output_count)
        return true;
    while (lent > 0)
        known.lease->give_up(leases[--lent]);
    return false;
}

/* A block with a copy of an input, which the record has leased; borrowed. NULL: none was made. */
static PyObject *copied_in(FastPath *self, const InputForm *form, const DLTensor *tensor, CallRecord *record)
{
    PyObject *leases = in_slot(self->arena, known.at.leases);
    if (form->block_bytes == NULL || in_slot(self->arena, known.at.busy) != Py_False || !Py_IS_TYPE(leases, known.leases))
        return NULL;
    unsigned long long begun_ns = clock_ns();
    PyObject *block = idle_block(self, form->block_bytes, begun_ns);
    if (block == NULL)
        return NULL;
    Form bytes = {.code = DL_UNSIGNED, .bits = 8, .ndim = 1, .shape = {(int64_t)form->nbytes}};
    uint64_t offset = number_in(block, known.at.offset);
    struct Lease *lease = known.lease->lend(leases, &bytes, offset, block);
    if (lease == NULL) { /* no memory: the block is lost to the arena, and no other harm is done */
        PyErr_Clear();
        Py_DECREF(block);
        return NULL;
    }
    record->copies[record->copy_count++] = lease;
    memcpy((uint8_t *)(uintptr_t)(self->address + offset), data_of(tensor), form->nbytes);
    record->copied_bytes += form->nbytes;
    record->copy_ns += clock_ns() - begun_ns;
    Py_DECREF(block); /* the lease has it */
    return block;
}

/* Find the blocks that the inputs begin, or copy them into some, and note places and holds. */
static bool find_inputs(FastPath *self, const Kind *kind, const DLTensor *tensors, CallRecord *record, Places *places)
{
    PyObject *blocks = in_slot(self->arena, known.at.blocks);
    for (int i = 0; i < kind->input_count; i++) {
        uint64_t offset = (uint64_t)(uintptr_t)data_of(&tensors[i]) - self->address;
        PyObject *number = PyLong_FromUnsignedLongLong(offset);
        PyObject *block = number == NULL ? NULL : PyDict_GetItemWithError(blocks, number);
        Py_XDECREF(number);
        if (block == NULL) {
            PyErr_Clear();
            if (is_elsewhere(self, &tensors[i])) /* one that lies inside of a block is found by Python */
                block = copied_in(self, &kind->inputs[i], &tensors[i], record);
            if (block == NULL)
                return false;
            offset = number_in(block, known.at.offset);
        }
        places->offsets[i] = offset;
        places->generations[i] = (uint32_t)number_in(block, known.at.generation);
        record->held[record->held_count++] = Py_NewRef(in_slot(block, known.at.hold));
    }
    return true;
}

/* --- one call ------------------------------------------------------------------------------------------------------------------------------- */

/* Not an object that a caller sees: nothing was done, and Python is to call. */
static PyObject not_ordinary_object;
#define NOT_ORDINARY (&not_ordinary_object)

/* A record for the next call. It is there before a call begins, so that none is allocated while nothing may come between. */
static bool has_record(FastPath *self)
{
    if (self->spare != NULL)
        return true;
    self->spare = (CallRecord *)known.call->tp_alloc(known.call, 0);
    if (self->spare == NULL)
        PyErr_Clear();
    return self->spare != NULL;
}

/* Done with: kept for the next call where nobody else has it. */
static void give_back(FastPath *self, CallRecord *record)
{
    if (Py_REFCNT(record) == 1 && self->spare == NULL) {
        clear_record(record);
        if (self->spare == NULL) { /* what was let go of may have made a call */
            self->spare = record;
            return;
        }
    }
    Py_DECREF(record);
}

static inline void set_reference(PyObject **place, PyObject *value)
{
    Py_XSETREF(*place, Py_XNewRef(value));
}

/* Publish the frame of a call at `places`. 1: it is outstanding; 0: nothing was done; -1: it is outstanding, and an error is set. Up to the commit nothing
 * may come between. */
static int publish(FastPath *self, const Kind *kind, CallRecord *record, PyObject *inputs, const Places *places, unsigned long long begun_ns)
{
    Sender *sender = &((AnySender *)self->ends->sender)->sender;
    uint8_t *slot = shmbroker_claim(&sender->queue);
    PyObject *call_id = slot == NULL ? NULL : PyIter_Next(self->call_ids);
    if (call_id == NULL) {
        PyErr_Clear();
        return 0;
    }
    record->call_id = PyLong_AsUnsignedLongLong(call_id);
    record->begun_ns = begun_ns;
    record->deadline_ns = self->limit_ns ? begun_ns + self->limit_ns : 0;
    set_reference(&record->plan, kind->plan);
    set_reference(&record->inputs, inputs);
    set_reference(&record->state, known.outstanding);
    set_reference(&record->error, Py_None);
    set_reference(&record->back, known.nothing);
    if (record->holds == NULL)
        set_reference(&record->holds, known.nothing); /* where there is no block to hold */
    set_reference(&record->wake, Py_None);
    set_reference(&record->future, Py_None);
    int registered = PyDict_SetItem(in_slot(self->pair, known.at.outstanding), call_id, (PyObject *)record);
    Py_DECREF(call_id);
    if (registered < 0) {
        PyErr_Clear();
        return 0;
    }
    record->submitted_ns = clock_ns();
    shmbroker_fill_submission(slot, PyBytes_AS_STRING(kind->packed), (size_t)PyBytes_GET_SIZE(kind->packed), record->call_id, record->deadline_ns,
                              record->submitted_ns);
    int tensors = kind->input_count + kind->output_count;
    for (int i = 0; i < tensors; i++)
        shmbroker_fill_tensor(slot, i, places->offsets[i], places->generations[i]);
    self->made += 1;
    return commit(sender, slot) ? 1 : -1;
}

/* Finish a call that was answered without a word, as Call.finish does. */
static void finish(FastPath *self, const Kind *kind, CallRecord *record, uint64_t queued_ns, uint64_t compute_ns, unsigned long long taken_ns)
{
    Counters *counters = (Counters *)self->statistics;
    unsigned long long now_ns = clock_ns(), rpc_ns = now_ns - record->begun_ns;
    counters->calls += 1;
    counters->rpc_ns += (long long)rpc_ns;
    counters->compute_ns += (long long)(compute_ns < rpc_ns ? compute_ns : rpc_ns);
    counters->queued_ns += (long long)(queued_ns < rpc_ns ? queued_ns : rpc_ns);
    counters->build_ns += (long long)(record->submitted_ns - record->begun_ns);
    counters->read_ns += (long long)(now_ns - taken_ns);
    counters->sent_bytes += kind->sent_bytes;
    counters->received_bytes += kind->received_bytes;
    counters->copied_bytes += (long long)record->copied_bytes;
    counters->copy_ns += (long long)record->copy_ns;
    counters->build_ns -= (long long)record->copy_ns;
    set_reference(&record->state, known.done);
    PyObject *sample = PyLong_FromUnsignedLongLong(rpc_ns);
    PyObject *appended = sample == NULL ? NULL : PyObject_CallMethodOneArg(in_slot(self->statistics, known.at.samples), known.append_name, sample);
    Py_XDECREF(sample);
    Py_XDECREF(appended);
    unsigned __int128 squared = (unsigned __int128)rpc_ns * rpc_ns;
    uint64_t high = (uint64_t)(squared >> 64), low = (uint64_t)squared;
    Py_ssize_t bucket = high ? 128 - __builtin_clzll(high) : low ? 64 - __builtin_clzll(low) : 0;
    PyObject *buckets = in_slot(self->pair, known.at.buckets);
    PyObject *counted = PyLong_FromLongLong(PyLong_AsLongLong(PyList_GET_ITEM(buckets, bucket)) + 1);
    if (counted != NULL)
        PyList_SetItem(buckets, bucket, counted);
    PyErr_Clear(); /* a call that was answered is not lost for want of memory for its figures */
}

/* Look for the answer, as long as nobody else reads; whether the call was finished here. While it looks nothing can come between. */
static bool look(FastPath *self, const Kind *kind, CallRecord *record)
{
    if (record->state != known.outstanding || !may_read(self)) /* whoever has finished it meanwhile may have failed it */
        return false;
    Receiver *receiver = &((AnyReceiver *)self->ends->receiver)->receiver;
    unsigned long long until = record->submitted_ns + self->look_ns;
    do {
        for (int i = 0; i < LOOKS_FOR_EACH_CLOCK; i++) {
            const uint8_t *slot = shmbroker_peek(&receiver->queue);
            if (slot != NULL) {
                unsigned long long taken_ns = clock_ns();
                struct shmbroker_completion_frame frame;
                PyObject *outstanding = in_slot(self->pair, known.at.outstanding);
                if (!shmbroker_copy_completion(slot, &frame) || frame.call_id != record->call_id || frame.status || frame.text_bytes)
                    return false;
                PyObject *call_id = PyLong_FromUnsignedLongLong(frame.call_id);
                bool was_outstanding = call_id != NULL && PyDict_DelItem(outstanding, call_id) == 0;
                Py_XDECREF(call_id);
                if (!was_outstanding) {
                    PyErr_Clear();
                    return false;
                }
                shmbroker_advance(&receiver->queue);
                finish(self, kind, record, frame.queued_ns, frame.compute_ns, taken_ns);
                return true;
            }
            relax();
        }
    } while (clock_ns() < until);
    return false;
}

/* Make the tensors of blocks that were lent: the output, or a tuple of them. NULL with an error set. */
static PyObject *make_outputs(const Kind *kind, struct Lease **leases)
{
    PyObject *made = kind->single ? NULL : PyTuple_New(kind->output_count);
    bool failed = !kind->single && made == NULL;
    for (int i = 0; i < kind->output_count; i++) {
        PyObject *tensor = failed ? NULL : known.lease->tensor_of(leases[i], known.exchange);
        if (failed)
            known.lease->give_up(leases[i]);
        else if (tensor == NULL)
            failed = true;
        else if (kind->single)
            made = tensor;
        else
            PyTuple_SET_ITEM(made, i, tensor);
    }
    if (failed)
        Py_CLEAR(made);
    return made;
}

static void give_up_outputs(const Kind *kind, struct Lease **leases)
{
    for (int i = 0; i < kind->output_count; i++)
        known.lease->give_up(leases[i]);
}

/* Wait for a call as Python does. Takes over `outputs`. */
static PyObject *wait_for(FastPath *self, const Kind *kind, CallRecord *record, PyObject *outputs)
{
    PyObject *several = kind->single ? PyTuple_Pack(1, outputs) : Py_NewRef(outputs);
    Py_DECREF(outputs);
    if (several == NULL)
        return NULL;
    Py_XSETREF(record->outputs, several);
    PyObject *arguments[] = {self->pair, (PyObject *)record};
    return PyObject_Vectorcall(known.wait, arguments, 2, NULL);
}

/* Wake the worker if it sleeps: a frame will follow in a moment. False: an error is set. Runs Python code. */
static bool nudge(FastPath *self)
{
    PyObject *kept = Py_NewRef(self->ends->sender); /* which may be closed meanwhile */
    Sender *sender = &((AnySender *)kept)->sender;
    bool nudged = ring_if(sender, shmbroker_nudge(sender->peer_sleeping));
    Py_DECREF(kept);
    return nudged;
}

/* op(*inputs): its result, NULL with an error set, or NOT_ORDINARY. */
static PyObject *call(FastPath *self, PyObject *inputs)
{
    unsigned long long begun_ns = clock_ns();
    Py_ssize_t count = PyTuple_GET_SIZE(inputs);
    if (self->kind_count == 0 || self->ends->sender == NULL || count > SHMBROKER_MAX_TENSORS || (self->limit_ns && self->limit_ns < SHORTEST_LIMIT_NS)
        || is_differentiating())
        return NOT_ORDINARY;
    for (Py_ssize_t i = 0; i < count; i++)
        if (!is_plain(PyTuple_GET_ITEM(inputs, i)))
            return NOT_ORDINARY;
    if (!collect(self) || !has_record(self) || self->ends->sender == NULL)
        return NOT_ORDINARY;
    if (!nudge(self))
        return NULL;
    /* From here to the commit nothing may come between; but where an input is to be copied, it is looked at first, and all are borrowed anew. */
    DLTensor tensors[SHMBROKER_MAX_TENSORS];
    int elsewhere = borrow_inputs(self, inputs, tensors);
    if (elsewhere > 0) {
        for (Py_ssize_t i = 0; i < count; i++) {
            DLTensor *tensor = &tensors[i];
            if (is_elsewhere(self, tensor) && !has_own_bytes(PyTuple_GET_ITEM(inputs, i), data_of(tensor), bytes_of(tensor)))
                return NOT_ORDINARY;
        }
        if (self->ends->sender == NULL || borrow_inputs(self, inputs, tensors) != elsewhere)
            return NOT_ORDINARY;
    }
    if (elsewhere < 0)
        return NOT_ORDINARY;
    Kind *kind = kind_of(self, tensors, count);
    if (kind == NULL || self->spare == NULL || !is_at_rest(self))
        return NOT_ORDINARY;
    Places places;
    struct Lease *leases[SHMBROKER_MAX_TENSORS];
    CallRecord *record = self->spare;
    self->spare = NULL;
    kind->uses += 1; /* it may be forgotten while this call is on its way */
    bool lent = find_inputs(self, kind, tensors, record, &places) && lend_outputs(self, kind, record, &places, leases, begun_ns);
    int published = lent ? publish(self, kind, record, inputs, &places, begun_ns) : 0;
    PyObject *result = published ? NULL : NOT_ORDINARY;
    if (published > 0)
        result = make_outputs(kind, leases);
    else if (lent)
        give_up_outputs(kind, leases);
    if (published > 0 && result != NULL && !look(self, kind, record))
        result = wait_for(self, kind, record, result);
    let_go_of_kind(kind);
    give_back(self, record);
    return result;
}

static PyMethodDef path_methods[] = {
    {"learn", METHOD(path_learn), METH_FASTCALL, "Know from now on by which plan tensors of such forms are called."},
    {NULL},
};
static PyMemberDef path_members[] = {
    {"made", T_ULONGLONG, offsetof(FastPath, made), READONLY, "Calls and replays that were made here."},
    {NULL},
};
static PyType_Slot path_slots[] = {
    {Py_tp_doc, "What one op's ordinary calls need."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, path_init},
    {Py_tp_dealloc, path_dealloc},
    {Py_tp_traverse, path_traverse},
    {Py_tp_clear, path_clear},
    {Py_tp_methods, path_methods},
    {Py_tp_members, path_members},
    {0, NULL},
};
static PyType_Spec path_spec = {
    .name = "shmbroker.call._calls.FastPath",
    .basicsize = sizeof(FastPath),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = path_slots,
};

/* --- Capture: a call that is replayed ------------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject *tensor;
    void *data; /* where it lay */
} Placed;

typedef struct {
    PyObject_HEAD
    FastPath *path;
    Kind *kind;
    PyObject *inputs, *holds, *outputs;
    Places places;
    int handed_count, written_count;
    Placed handed[SHMBROKER_MAX_TENSORS], written[SHMBROKER_MAX_TENSORS];
} Capture;

static int capture_traverse(Capture *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->path);
    Py_VISIT(self->inputs);
    Py_VISIT(self->holds);
    Py_VISIT(self->outputs);
    for (int i = 0; i < self->handed_count; i++)
        Py_VISIT(self->handed[i].tensor);
    for (int i = 0; i < self->written_count; i++)
        Py_VISIT(self->written[i].tensor);
    return 0;
}

static void capture_dealloc(Capture *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    while (self->handed_count > 0) {
        PyObject *tensor = self->handed[--self->handed_count].tensor;
        Py_DECREF(tensor);
    }
    while (self->written_count > 0) {
        PyObject *tensor = self->written[--self->written_count].tensor;
        Py_DECREF(tensor);
    }
    if (self->kind != NULL)
        let_go_of_kind(self->kind);
    Py_CLEAR(self->path);
    Py_CLEAR(self->inputs);
    Py_CLEAR(self->holds);
    Py_CLEAR(self->outputs);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

/* Fill `placed` from ((tensor, address), ...). False: an error is set. */
static bool read_placed(PyObject *pairs, Placed *placed, int *count)
{
    if (!PyTuple_Check(pairs) || PyTuple_GET_SIZE(pairs) > SHMBROKER_MAX_TENSORS) {
        PyErr_SetString(PyExc_TypeError, "places are a tuple of (tensor, address), 12 at most");
        return false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(pairs); i++) {
        PyObject *tensor;
        unsigned long long address;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(pairs, i), "OK", &tensor, &address))
            return false;
        placed[i] = (Placed){Py_NewRef(tensor), (void *)(uintptr_t)address};
        *count += 1;
    }
    return true;
}

/* Capture(path, plan, inputs, outputs, offsets, generations, holds, handed, written) */
static int capture_init(Capture *self, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"path", "plan", "inputs", "outputs", "offsets", "generations", "holds", "handed", "written", NULL};
    PyObject *path, *plan, *inputs, *outputs, *offsets, *generations, *holds, *handed, *written;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOO!O!O!O!OOO", names, &path, &plan, &PyTuple_Type, &inputs, &PyTuple_Type, &outputs,
                                     &PyList_Type, &offsets, &PyList_Type, &generations, &holds, &handed, &written))
        return -1;
    Py_ssize_t tensors = PyList_GET_SIZE(offsets);
    if (self->path != NULL || tensors != PyList_GET_SIZE(generations) || tensors != PyTuple_GET_SIZE(inputs) + PyTuple_GET_SIZE(outputs)
        || tensors > SHMBROKER_MAX_TENSORS) {
        PyErr_SetString(PyExc_ValueError, "a Capture is made once, with an offset and a generation for each tensor");
        return -1;
    }
    for (Py_ssize_t i = 0; i < tensors; i++) {
        uint64_t generation;
        if (!as_unsigned(PyList_GET_ITEM(offsets, i), UINT64_MAX, "an offset", &self->places.offsets[i])
            || !as_unsigned(PyList_GET_ITEM(generations, i), UINT32_MAX, "a generation", &generation))
            return -1;
        self->places.generations[i] = (uint32_t)generation;
    }
    if (!read_placed(handed, self->handed, &self->handed_count) || !read_placed(written, self->written, &self->written_count))
        return -1;
    self->kind = kind_of_plan(plan);
    if (self->kind == NULL)
        return -1;
    self->kind->input_count = (int)PyTuple_GET_SIZE(inputs);
    self->kind->output_count = (int)PyTuple_GET_SIZE(outputs);
    self->path = (FastPath *)Py_NewRef(path);
    self->inputs = Py_NewRef(inputs);
    self->outputs = Py_NewRef(outputs);
    self->holds = Py_NewRef(holds);
    return 0;
}

/* Whether all lie where they lay. Runs no Python code. */
static bool lie_there(const Placed *placed, int count)
{
    for (int i = 0; i < count; i++) {
        DLTensor lent;
        if (known.exchange->borrow(placed[i].tensor, &lent) < 0) {
            PyErr_Clear();
            return false;
        }
        if ((uint8_t *)lent.data + lent.byte_offset != placed[i].data)
            return false;
    }
    return true;
}

static bool want_no_gradient(const Placed *placed, int count)
{
    for (int i = 0; i < count; i++)
        if (!is_false(known.requires_grad->get(placed[i].tensor, known.requires_grad->closure)))
            return false;
    return true;
}

/* Its result, NULL with an error set, or NOT_ORDINARY. `moved`: set where the outputs do not lie any more where they were written. */
static PyObject *replay(Capture *self, bool *moved)
{
    unsigned long long begun_ns = clock_ns();
    FastPath *path = self->path;
    if (path->ends->sender == NULL || (path->limit_ns && path->limit_ns < SHORTEST_LIMIT_NS) || !want_no_gradient(self->handed, self->handed_count)
        || !has_record(path) || path->ends->sender == NULL)
        return NOT_ORDINARY;
    if (!nudge(path))
        return NULL;
    /* From here to the commit nothing may come between. */
    if (!lie_there(self->handed, self->handed_count) || path->spare == NULL || !is_at_rest(path))
        return NOT_ORDINARY;
    CallRecord *record = path->spare;
    path->spare = NULL;
    set_reference(&record->holds, self->holds);
    int published = publish(path, self->kind, record, self->inputs, &self->places, begun_ns);
    PyObject *result = published ? NULL : NOT_ORDINARY;
    if (published > 0) {
        /* While the worker is at it. */
        *moved = !lie_there(self->written, self->written_count) || !want_no_gradient(self->written, self->written_count);
        result = Py_NewRef(self->kind->single ? PyTuple_GET_ITEM(self->outputs, 0) : self->outputs);
        if (!look(path, self->kind, record))
            result = wait_for(path, self->kind, record, result);
    }
    give_back(path, record);
    return result;
}

static PyType_Slot capture_slots[] = {
    {Py_tp_doc, "What a captured call is replayed by."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, capture_init},
    {Py_tp_dealloc, capture_dealloc},
    {Py_tp_traverse, capture_traverse},
    {0, NULL},
};
static PyType_Spec capture_spec = {
    .name = "shmbroker.call._calls.Capture",
    .basicsize = sizeof(Capture),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = capture_slots,
};

/* --- what RemoteOp and CapturedCall are mixed with ------------------------------------------------------------------------------------------ */

/* function(self, *arguments, **keywords) */
static PyObject *call_with(PyObject *function, PyObject *self, PyObject *const *arguments, Py_ssize_t count, PyObject *keywords)
{
    PyObject *some[16], **all = count + 1 <= 16 ? some : PyMem_Malloc((size_t)(count + 1) * sizeof *all);
    if (all == NULL)
        return PyErr_NoMemory();
    all[0] = self;
    memcpy(all + 1, arguments, (size_t)count * sizeof *all);
    PyObject *result = PyObject_VectorcallDict(function, all, (size_t)count + 1, keywords);
    if (all != some)
        PyMem_Free(all);
    return result;
}

static inline bool has_any(PyObject *keywords)
{
    return keywords != NULL && PyDict_GET_SIZE(keywords) > 0;
}

static PyObject *op_call(PyObject *self, PyObject *inputs, PyObject *keywords)
{
    PyObject *path = in_slot(self, known.at.fast);
    if (path != NULL && Py_IS_TYPE(path, known.path) && !has_any(keywords)) {
        Py_INCREF(path);
        PyObject *result = call((FastPath *)path, inputs);
        Py_DECREF(path);
        if (result != NOT_ORDINARY)
            return result;
    }
    return call_with(known.op_call, self, &PyTuple_GET_ITEM(inputs, 0), PyTuple_GET_SIZE(inputs), keywords);
}

static PyType_Slot op_slots[] = {{Py_tp_doc, "Calls, the ordinary ones compiled."}, {Py_tp_call, op_call}, {0, NULL}};
static PyType_Spec op_spec = {
    .name = "shmbroker.call._calls.Callable",
    .basicsize = sizeof(PyObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = op_slots,
};

static PyObject *captured_replay(PyObject *self, PyObject *arguments, PyObject *keywords)
{
    PyObject *capture = in_slot(self, known.at.replay);
    if (capture != NULL && Py_IS_TYPE(capture, known.capture) && !has_any(keywords) && PyTuple_GET_SIZE(arguments) == 0) {
        bool moved = false;
        Py_INCREF(capture);
        PyObject *result = replay((Capture *)capture, &moved);
        Py_DECREF(capture);
        if (result != NOT_ORDINARY) {
            PyObject *checked = result != NULL && moved ? PyObject_CallOneArg(known.check_written, self) : Py_NewRef(Py_None);
            if (checked == NULL)
                Py_CLEAR(result);
            Py_XDECREF(checked);
            return result;
        }
    }
    return call_with(known.replay, self, &PyTuple_GET_ITEM(arguments, 0), PyTuple_GET_SIZE(arguments), keywords);
}

static PyMethodDef captured_methods[] = {
    {"replay", METHOD(captured_replay), METH_VARARGS | METH_KEYWORDS, "Call again and wait, compiled where that is ordinary."},
    {NULL},
};
static PyType_Slot captured_slots[] = {{Py_tp_doc, "Replays, the ordinary ones compiled."}, {Py_tp_methods, captured_methods}, {0, NULL}};
static PyType_Spec captured_spec = {
    .name = "shmbroker.call._calls.Replayable",
    .basicsize = sizeof(PyObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = captured_slots,
};

/* --- module --------------------------------------------------------------------------------------------------------------------------------- */

typedef struct {
    const char *owner, *name;
    Py_ssize_t *offset;
} SlotName;

/* An object that set_up was given, new reference; NULL with TypeError where it was not. */
static PyObject *given(PyObject *objects, const char *name)
{
    PyObject *object = PyDict_GetItemString(objects, name);
    if (object == NULL)
        PyErr_Format(PyExc_TypeError, "set_up lacks %s", name);
    return Py_XNewRef(object);
}

static bool find_slots_of(PyObject *objects)
{
    const SlotName names[] = {
        {"RemoteOp", "fast", &known.at.fast},
        {"CapturedCall", "fast", &known.at.replay},
        {"QueuePair", "_due", &known.at.due},
        {"QueuePair", "_lost", &known.at.lost},
        {"QueuePair", "_outstanding", &known.at.outstanding},
        {"QueuePair", "lane", &known.at.lane},
        {"QueuePair", "buckets", &known.at.buckets},
        {"CompletionLoop", "_wanted", &known.at.wanted},
        {"Arena", "_busy", &known.at.busy},
        {"Arena", "_idle", &known.at.idle},
        {"Arena", "_idle_count", &known.at.idle_count},
        {"Arena", "_leases", &known.at.leases},
        {"Arena", "_named", &known.at.named},
        {"Arena", "_ring", &known.at.ring},
        {"Arena", "blocks", &known.at.blocks},
        {"RingAllocator", "placed", &known.at.placed},
        {"Extent", "offset", &known.at.offset},
        {"Extent", "hold", &known.at.hold},
        {"Extent", "generation", &known.at.generation},
        {"Extent", "placed_at", &known.at.placed_at},
        {"Extent", "nbytes", &known.at.nbytes},
        {"Plan", "rooms", &known.at.rooms},
        {"Plan", "single", &known.at.single},
        {"Plan", "template", &known.at.template},
        {"Plan", "sent_bytes", &known.at.sent_bytes},
        {"Plan", "received_bytes", &known.at.received_bytes},
        {"FrameTemplate", "packed", &known.at.packed},
        {"Room", "nbytes", &known.at.room_nbytes},
        {"Room", "form", &known.at.form},
        {"Room", "as_integers", &known.at.as_integers},
        {"OpStatistics", "samples", &known.at.samples},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        PyObject *owner = given(objects, names[i].owner);
        *names[i].offset = owner == NULL ? -1 : offset_of_slot(owner, names[i].name);
        Py_XDECREF(owner);
        if (*names[i].offset < 0)
            return false;
    }
    return true;
}

/* What torch has for C: a tensor's own C functions, and the exchange of tensors. */
static bool find_torch(PyObject *tensor)
{
    PyObject *gradient = PyObject_GetAttrString(tensor, "requires_grad"), *negative = PyObject_GetAttrString(tensor, "is_neg");
    PyObject *capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
    bool found = false;
    if (gradient != NULL && negative != NULL && capsule != NULL) {
        const DLPackExchange *exchange = PyCapsule_GetPointer(capsule, DLPACK_EXCHANGE);
        found = exchange != NULL && exchange->version.major == 1 && exchange->borrow != NULL && exchange->to_object != NULL
                && Py_IS_TYPE(gradient, &PyGetSetDescr_Type) && Py_IS_TYPE(negative, &PyMethodDescr_Type)
                && ((PyMethodDescrObject *)negative)->d_method->ml_flags == METH_NOARGS;
        if (found) {
            known.exchange = exchange;
            known.requires_grad = ((PyGetSetDescrObject *)gradient)->d_getset;
            known.is_neg = ((PyMethodDescrObject *)negative)->d_method;
        }
    }
    Py_XDECREF(gradient);
    Py_XDECREF(negative);
    Py_XDECREF(capsule);
    if (!found && !PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "this torch exchanges tensors otherwise");
    return found;
}

/* set_up(**objects): once, by compiled_op.py. TypeError where something is not as it has to be: then there are no compiled calls. */
static PyObject *set_up(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(arguments), PyObject *objects)
{
    if (objects == NULL || !find_slots_of(objects))
        return NULL;
    const struct {
        const char *name;
        PyObject **place;
    } kept[] = {
        {"Call", (PyObject **)&known.call},
        {"Tensor", (PyObject **)&known.tensor},
        {"Leases", (PyObject **)&known.leases},
        {"SubmissionSender", (PyObject **)&known.submission_sender},
        {"CompletionReceiver", (PyObject **)&known.completion_receiver},
        {"OUTSTANDING", &known.outstanding},
        {"DONE", &known.done},
        {"levels", &known.levels},
        {"is_transformed", &known.is_transformed},
        {"wait", &known.wait},
        {"op_call", &known.op_call},
        {"replay", &known.replay},
        {"check_written", &known.check_written},
    };
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) {
        Py_XSETREF(*kept[i].place, given(objects, kept[i].name));
        if (*kept[i].place == NULL)
            return NULL;
    }
    known.lease = PyCapsule_Import(LEASE_FUNCTIONS, 0);
    if (known.lease == NULL || !find_torch((PyObject *)known.tensor))
        return NULL;
    Py_RETURN_NONE;
}

static int module_exec(PyObject *module)
{
    known.nothing = PyTuple_New(0);
    known.level_name = PyUnicode_InternFromString("_current_level");
    known.append_name = PyUnicode_InternFromString("append");
    known.untyped_storage = PyUnicode_InternFromString("untyped_storage");
    known.nbytes = PyUnicode_InternFromString("nbytes");
    known.data_ptr = PyUnicode_InternFromString("data_ptr");
    if (known.untyped_storage == NULL || known.nbytes == NULL || known.data_ptr == NULL || known.nothing == NULL || known.level_name == NULL || known.append_name == NULL)
        return -1;
    PyType_Spec *specs[] = {&call_record_spec, &counters_spec, &ends_spec, &path_spec, &capture_spec, &op_spec, &captured_spec};
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        PyObject *type = PyType_FromModuleAndSpec(module, specs[i], NULL);
        if (type == NULL || PyModule_AddType(module, (PyTypeObject *)type) < 0) {
            Py_XDECREF(type);
            return -1;
        }
        if (specs[i] == &path_spec)
            known.path = (PyTypeObject *)Py_NewRef(type);
        else if (specs[i] == &capture_spec)
            known.capture = (PyTypeObject *)Py_NewRef(type);
        Py_DECREF(type);
    }
    return 0;
}

static PyMethodDef module_methods[] = {
    {"set_up", METHOD(set_up), METH_VARARGS | METH_KEYWORDS, "Tell the classes that compiled calls work on, once."},
    {NULL},
};
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmbroker.call._calls",
    .m_doc = "Calls, compiled. Used through shmbroker.call.compiled_op.",
    .m_methods = module_methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__calls(void)
{
    return PyModuleDef_Init(&module_def);
}
