/* Attributes of Python objects as C reads them: those of a class with __slots__ lie at offsets that its member descriptors tell.
 *
 * So that what is compiled works on the very objects that Python works on, and either can go on where the other stopped.
 */
#ifndef SHMBROKER_SLOTS_H
#define SHMBROKER_SLOTS_H

#include "_arguments.h"

#include <structmember.h>

/* Where instances of `type` (and of its subclasses) have the attribute. -1 with TypeError: it is no slot. */
static inline Py_ssize_t offset_of_slot(PyObject *type, const char *name)
{
    PyObject *descriptor = PyObject_GetAttrString(type, name);
    if (descriptor == NULL)
        return -1;
    Py_ssize_t offset = -1;
    if (Py_IS_TYPE(descriptor, &PyMemberDescr_Type))
        offset = ((PyMemberDescrObject *)descriptor)->d_member->offset;
    else
        PyErr_Format(PyExc_TypeError, "%s of %R is no slot", name, type);
    Py_DECREF(descriptor);
    return offset;
}

/* The attribute, borrowed; NULL where it is not set. */
static inline PyObject **slot_at(PyObject *object, Py_ssize_t offset)
{
    return (PyObject **)((char *)object + offset);
}

static inline PyObject *in_slot(PyObject *object, Py_ssize_t offset)
{
    return *slot_at(object, offset);
}

/* Set it; takes over the reference. */
static inline void set_slot(PyObject *object, Py_ssize_t offset, PyObject *value)
{
    Py_XSETREF(*slot_at(object, offset), value);
}

#endif
