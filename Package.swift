// swift-tools-version: 6.2
import PackageDescription

/// Settings of every Swift target: warnings are errors only in `make check` (so that a newer compiler still builds a release).
let swift: [SwiftSetting] = [
    .swiftLanguageMode(.v6),
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("InternalImportsByDefault"),
]

let package = Package(
    name: "memdevd",
    products: [
        .executable(name: "memdevd", targets: ["memdevd"]),
        .executable(name: "memdevctl", targets: ["memdevctl"]),
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
        .package(url: "https://github.com/apple/swift-log", from: "1.16.2"),
        .package(url: "https://github.com/jpsim/Yams", from: "6.2.2"),
        .package(url: "https://github.com/apple/swift-crypto", from: "4.5.2"),
        .package(url: "https://github.com/apple/swift-nio", from: "2.101.2"),
        .package(url: "https://github.com/apple/swift-nio-ssl", from: "2.37.6"),
        .package(url: "https://github.com/apple/swift-certificates", from: "1.21.1"),
    ],
    targets: [
        // The engine: no package dependencies, no Foundation. Each target knows only those above it.
        .target(name: "CVhost", linkerSettings: [.linkedLibrary("uring"), .linkedLibrary("cap")]),
        .target(name: "Kernel", dependencies: ["CVhost"], swiftSettings: swift),
        // The file that `memdevctl trace` writes: knows nothing of how its records come about.
        .target(name: "TraceFormat", swiftSettings: swift),
        .target(name: "RemoteRAM", dependencies: ["Kernel", "TraceFormat"], swiftSettings: swift),
        .target(name: "MemDeviceServer", dependencies: ["RemoteRAM"], swiftSettings: swift),
        .target(name: "Migrator", dependencies: ["RemoteRAM"], swiftSettings: swift),
        // The privileged parent of the server: knows nothing of VMs.
        .target(name: "Keeper", dependencies: ["Kernel"], swiftSettings: swift),

        // The edges: command line, configuration, control API.
        .target(name: "ControlAPI", swiftSettings: swift),
        .target(name: "Settings", dependencies: ["ControlAPI", .product(name: "Yams", package: "Yams")], swiftSettings: swift),
        .executableTarget(
            name: "memdevd",
            dependencies: [
                "MemDeviceServer", "Migrator", "Keeper", "ControlAPI", "Settings", "TraceFormat",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
                .product(name: "Logging", package: "swift-log"),
                .product(name: "Crypto", package: "swift-crypto"),
                .product(name: "NIOCore", package: "swift-nio"),
                .product(name: "NIOEmbedded", package: "swift-nio"),
                .product(name: "NIOTLS", package: "swift-nio"),
                .product(name: "NIOSSL", package: "swift-nio-ssl"),
            ],
            swiftSettings: swift),
        .executableTarget(
            name: "memdevctl",
            dependencies: [
                "ControlAPI", "TraceFormat",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
                .product(name: "Crypto", package: "swift-crypto"),
                .product(name: "X509", package: "swift-certificates"),
            ],
            swiftSettings: swift),

        // What a VMM links or preloads: C, no Swift runtime. The Makefile builds the shared library; this target lets tests link it.
        .target(name: "libmemdev", path: "Sources/libmemdev", exclude: ["preload.c"]),

        // What the engine's tests share, and a VMM of its own process for those that kill it.
        .target(name: "TestSupport", dependencies: ["MemDeviceServer"], path: "Tests/TestSupport", swiftSettings: swift),
        .executableTarget(name: "test-vmm", dependencies: ["CVhost", "Keeper", "TestSupport"], path: "Tests/TestVMM", swiftSettings: swift),
        .testTarget(name: "KernelTests", dependencies: ["Kernel", "TestSupport", "test-vmm"], swiftSettings: swift),
        .testTarget(name: "TraceFormatTests", dependencies: ["TraceFormat", "TestSupport"], swiftSettings: swift),
        .testTarget(name: "RemoteRAMTests", dependencies: ["RemoteRAM", "TraceFormat", "TestSupport", "test-vmm"], swiftSettings: swift),
        .testTarget(name: "MemDeviceServerTests", dependencies: ["MemDeviceServer", "TestSupport", "test-vmm"], swiftSettings: swift),
        .testTarget(name: "MigratorTests", dependencies: ["Migrator", "TestSupport", "test-vmm"], swiftSettings: swift),
        // Measures the data path of a migration (docs/benchmarks.md).
        .executableTarget(name: "move-rate", dependencies: ["Migrator", "TestSupport"], path: "Tests/MoveRate", swiftSettings: swift),
        .testTarget(name: "KeeperTests", dependencies: ["Keeper", "TestSupport", "test-vmm", "test-keeper"], swiftSettings: swift),
        .executableTarget(name: "test-keeper", dependencies: ["Keeper"], path: "Tests/TestKeeper", swiftSettings: swift),
        .testTarget(name: "ControlAPITests", dependencies: ["ControlAPI"], swiftSettings: swift),
        .testTarget(name: "SettingsTests", dependencies: ["Settings", "ControlAPI"], swiftSettings: swift),
        .testTarget(
            name: "MemdevdTests",
            dependencies: [
                "memdevd", "memdevctl", "MemDeviceServer", "Migrator", "RemoteRAM", "ControlAPI", "Kernel", "Settings", "TestSupport", "TraceFormat",
                .product(name: "NIOSSL", package: "swift-nio-ssl"),
            ],
            swiftSettings: swift),
        .testTarget(name: "MemdevctlTests", dependencies: ["memdevctl", "ControlAPI", "TraceFormat"], swiftSettings: swift),
    ]
)
