/// Text in a picture: letters of 5 × 7 points, in cells of 6 × 8.
enum PixelText {
    static let cellWidth = 6
    static let cellHeight = 8

    /// Draws `text` with its upper left corner at (x, y); each point is a square of `scale` pixels. Characters other than ASCII's are boxes.
    static func draw(_ text: String, x: Int, y: Int, scale: Int = 1, colour: UInt8, on picture: inout PNG) {
        for (position, scalar) in text.unicodeScalars.enumerated() {
            let columns = columns(of: scalar)
            for column in 0..<5 {
                let bits = UInt8(truncatingIfNeeded: columns >> UInt64(32 - 8 * column))
                for row in 0..<8 where bits >> row & 1 != 0 {
                    picture.fill(
                        x: x + (position * cellWidth + column) * scale, y: y + row * scale, width: scale, height: scale, colour: colour)
                }
            }
        }
    }

    static func width(_ text: String, scale: Int = 1) -> Int { text.unicodeScalars.count * cellWidth * scale }

    /// Five columns from left to right, the lowest bit of each at the top.
    private static func columns(of scalar: Unicode.Scalar) -> UInt64 {
        guard (32...126).contains(scalar.value) else { return 0x7F_41_41_41_7F }
        return letters[Int(scalar.value) - 32]
    }

    private static let letters: [UInt64] = [
        // space ! " # $ % & '
        0x00_00_00_00_00, 0x00_00_5F_00_00, 0x00_07_00_07_00, 0x14_7F_14_7F_14, 0x24_2A_7F_2A_12, 0x23_13_08_64_62, 0x36_49_55_22_50, 0x00_00_07_00_00,
        // ( ) * + , - . /
        0x00_1C_22_41_00, 0x00_41_22_1C_00, 0x14_08_3E_08_14, 0x08_08_3E_08_08, 0x00_50_30_00_00, 0x08_08_08_08_08, 0x00_60_60_00_00, 0x20_10_08_04_02,
        // 0 to 9
        0x3E_51_49_45_3E, 0x00_42_7F_40_00, 0x42_61_51_49_46, 0x21_41_45_4B_31, 0x18_14_12_7F_10, 0x27_45_45_45_39, 0x3C_4A_49_49_30, 0x01_71_09_05_03,
        0x36_49_49_49_36, 0x06_49_49_29_1E,
        // : ; < = > ? @
        0x00_36_36_00_00, 0x00_56_36_00_00, 0x08_14_22_41_00, 0x14_14_14_14_14, 0x00_41_22_14_08, 0x02_01_51_09_06, 0x32_49_79_41_3E,
        // A to Z
        0x7E_11_11_11_7E, 0x7F_49_49_49_36, 0x3E_41_41_41_22, 0x7F_41_41_22_1C, 0x7F_49_49_49_41, 0x7F_09_09_09_01, 0x3E_41_49_49_7A, 0x7F_08_08_08_7F,
        0x00_41_7F_41_00, 0x20_40_41_3F_01, 0x7F_08_14_22_41, 0x7F_40_40_40_40, 0x7F_02_0C_02_7F, 0x7F_04_08_10_7F, 0x3E_41_41_41_3E, 0x7F_09_09_09_06,
        0x3E_41_51_21_5E, 0x7F_09_19_29_46, 0x46_49_49_49_31, 0x01_01_7F_01_01, 0x3F_40_40_40_3F, 0x1F_20_40_20_1F, 0x3F_40_38_40_3F, 0x63_14_08_14_63,
        0x07_08_70_08_07, 0x61_51_49_45_43,
        // [ \ ] ^ _ `
        0x00_7F_41_41_00, 0x02_04_08_10_20, 0x00_41_41_7F_00, 0x04_02_01_02_04, 0x40_40_40_40_40, 0x00_01_02_04_00,
        // a to z
        0x20_54_54_54_78, 0x7F_48_44_44_38, 0x38_44_44_44_20, 0x38_44_44_48_7F, 0x38_54_54_54_18, 0x08_7E_09_01_02, 0x18_A4_A4_A4_7C, 0x7F_08_04_04_78,
        0x00_44_7D_40_00, 0x40_80_84_7D_00, 0x7F_10_28_44_00, 0x00_41_7F_40_00, 0x7C_04_18_04_78, 0x7C_08_04_04_78, 0x38_44_44_44_38, 0xFC_24_24_24_18,
        0x18_24_24_28_FC, 0x7C_08_04_04_08, 0x48_54_54_54_20, 0x04_3F_44_40_20, 0x3C_40_40_20_7C, 0x1C_20_40_20_1C, 0x3C_40_30_40_3C, 0x44_28_10_28_44,
        0x1C_A0_A0_A0_7C, 0x44_64_54_4C_44,
        // { | } ~
        0x00_08_36_41_00, 0x00_00_7F_00_00, 0x00_41_36_08_00, 0x08_04_08_10_08,
    ]
}
