"""The course as an nbgrader course: `nbgrader generate_assignment lora` and all that follows works in this folder."""

c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "minipeft"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "exercises"
c.ClearSolutions.code_stub = {"python": "# Write your code here, and take the NotImplementedError out."}
c.ClearMarkScheme.enforce_metadata = False  # explanations stand in plain markdown cells
c.ExecutePreprocessor.timeout = 120
# A warning on stderr must not cost a point.
c.IgnorePattern.enabled = True
c.IgnorePattern.pattern = r"(?s).*"
# Submissions are mended first, and their code runs in a process of its own, which never sees the answers.
c.Autograde.sanitize_preprocessors = [
    "minipeft.course.gradebook.Mend",
    "nbgrader.preprocessors.ClearOutput",
    "nbgrader.preprocessors.DeduplicateIds",
    "nbgrader.preprocessors.OverwriteKernelspec",
    "nbgrader.preprocessors.OverwriteCells",
    "nbgrader.preprocessors.CheckCellMetadata",
]
c.Autograde.autograde_preprocessors = [
    "minipeft.course.gradebook.Isolated",
    "nbgrader.preprocessors.IgnorePattern",
    "nbgrader.preprocessors.LimitOutput",
    "nbgrader.preprocessors.SaveAutoGrades",
    "nbgrader.preprocessors.AssignLatePenalties",
    "nbgrader.preprocessors.CheckCellMetadata",
]
# A student's own HTML does nothing in whoever reads the page.
c.SanitizeHTML.enabled = True
# Feedback shows what a learner may see: the verdicts, not the code of the hidden tests.
c.GenerateFeedback.preprocessors = [
    "nbgrader.preprocessors.ClearHiddenTests",
    "nbconvert.preprocessors.sanitize.SanitizeHTML",
    "nbgrader.preprocessors.GetGrades",
    "nbconvert.preprocessors.CSSHTMLHeaderPreprocessor",
]
