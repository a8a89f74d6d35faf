/* What the compiled parts take from Python: numbers, with the errors that a memoryview raises where it is given the same.
 *
 * | a number                                                     | raises                       |
 * |--------------------------------------------------------------|------------------------------|
 * | an int, or what has __index__ (a bool, a NumPy integer)       | nothing, where it fits       |
 * | such a one, negative or larger than its field                | ValueError                   |
 * | anything else (a float, a text, None)                        | TypeError                    |
 */
#ifndef SHMBROKER_ARGUMENTS_H
#define SHMBROKER_ARGUMENTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>

#define METHOD(function) ((PyCFunction)(void (*)(void))(function))

/* Any number, and the errors. */
__attribute__((cold, noinline, unused)) static bool as_unsigned_slowly(PyObject *number, uint64_t most, const char *name, uint64_t *value)
{
    Py_INCREF(number); /* __index__ is Python code: whoever lent the number may let go of it meanwhile */
    PyObject *integer = PyNumber_Index(number);
    Py_DECREF(number);
    if (integer == NULL)
        return false;
    *value = PyLong_AsUnsignedLongLong(integer);
    Py_DECREF(integer);
    bool failed = *value == UINT64_MAX && PyErr_Occurred();
    if (failed && !PyErr_ExceptionMatches(PyExc_OverflowError))
        return false;
    if (!failed && *value <= most)
        return true;
    PyErr_Format(PyExc_ValueError, "%s does not fit: 0 to %llu", name, (unsigned long long)most);
    return false;
}

/* The number, which has to lie in 0 .. most. False: an error is set. May run Python code (__index__): what that could change is looked at later. */
static inline bool as_unsigned(PyObject *number, uint64_t most, const char *name, uint64_t *value)
{
    if (PyLong_CheckExact(number)) {
        int beyond;
        long long most_often = PyLong_AsLongLongAndOverflow(number, &beyond); /* -1 where it is beyond */
        if (most_often >= 0 && (uint64_t)most_often <= most) {
            *value = (uint64_t)most_often;
            return true;
        }
    }
    return as_unsigned_slowly(number, most, name, value);
}

#endif
