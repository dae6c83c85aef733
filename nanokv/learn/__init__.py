"""The course: exercises whose solution is the engine itself. Knows functions by name; knows nothing of what they do.

exercises.toml -> course.py     which functions are exercises, and what is said about them
source.py                       their source: a gap where the body was, a file for the student, the solution
binding.py                      a student's function in the place of ours, everywhere, and back
running.py, expect.py           the tests of an exercise, and failures in words
job.py, checking.py, check_process.py   a check in a process of its own, with a time limit
progress.py, mine.py            what has been passed; the whole engine with the student's functions
"""
