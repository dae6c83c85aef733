"""The course: exercises whose solution is the engine itself. Knows functions by name; knows nothing of what they do.

exercises.toml -> course.py     which functions are exercises, with title, points and hint
source.py                       their source: a file for the student, the solution
patching.py                     a student's function in place of the engine's, under every name, and back
running.py, expect.py           the tests of an exercise, and failures in words
checking.py, check_process.py   a check in a process of its own, with a time limit; job.py is what the two exchange
progress.py, mine.py            which exercises have passed; the whole engine with the student's functions
cards.py                        interview questions whose numbers are computed
"""
