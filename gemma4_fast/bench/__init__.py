"""`gemma4-fast bench`: how fast each op and the whole model are, against the machine's limit and against what else there is.

rows       one measurement: its fields, files of them, how it prints
timing     interleaved sampling on cold data, CPU and CUDA; the roofline
ops        rows from the op table; scale: the same along an axis; memory: bytes of KV caches
model      the whole model beside its peers, each in a process of its own (peers/)
compare    two files of rows; plots, html: pictures; command: the command line
"""
