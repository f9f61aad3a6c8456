"""How the kernel is told what a job's process may touch: bubblewrap's namespaces, Landlock, seccomp."""
