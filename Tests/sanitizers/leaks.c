// LeakSanitizer's suppressions: leaks that are not this project's. In the programs themselves: a confined server can read no file at its end.
const char *__lsan_default_suppressions(void);

const char *__lsan_default_suppressions(void) {
	return
		// XCTest's own main, which runs before the tests proper and finds none.
		"leak:libXCTest.so\n"
		// The side table of a weakly referenced object (Foundation.Process has one): its object keeps the table's address shifted, where no scan finds it.
		"leak:formWeakReference\n";
}
