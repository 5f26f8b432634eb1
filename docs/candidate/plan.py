import json, sys
T = [f"docs/runs/best-40ep-seed{i}/weights.pkl" for i in range(3)]
job = lambda name, seed, epochs, teachers=(), validate=False, network="gated32": {
    "name": name, "network": network, "seed": seed, "epochs": epochs, "teachers": list(teachers), "validate": validate}
new = [job(f"best-40ep-seed{i}", i, 40) for i in (3, 4, 5)]
held = [job(f"validate-seed{i}", i, 40, validate=True) for i in (0, 1, 2)]
names = lambda jobs: [j["name"] for j in jobs]
students = lambda teachers, seeds=(0, 1): [job(f"student-seed{i}", i, None, teachers) for i in seeds]
line = [job(f"best-40ep-seed0-network={n}", 0, 40, network=n) for n in ("gated32-12k", "gated32-28k")]
plan = {
    "A": new + held + students(T + names(new)) + [job("student-validate", 0, None, names(held), True)] + line,
    "B": new + students(T + names(new)) + line,
    "C": students(T),
    "D": held + students(T) + [job("student-validate", 0, None, names(held), True)] + line,
}[sys.argv[1]]
json.dump(plan, open(sys.argv[2], "w"), indent=1)
